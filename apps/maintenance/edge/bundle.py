"""A bundle: the model of an edge box, what must be known of it, and how it proves itself.

    bundle.json  what ``BundleInfo`` holds
    golden.npz   features [N, D], hazard [N, C, H], life [N, 3], tolerance []
    model.onnx   features float32 [N, D] -> hazard [N, C, H], life [N, 3]

``hazard`` are probabilities of a failure of a component within a horizon; ``life`` is the low
end, the median and the high end of the remaining useful life, hours.  Packed, a bundle is an
uncompressed tar of these three in this order without times or owners: equal contents are equal
bytes, and a delta finds what did not change.

Legend: N windows, D features, C components, H horizons.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.durable import write_whole
from apps.maintenance.edge.spread import HAZARD, LIFE, Spread
from cluster.errors import ConfigurationError

FORMAT = "trimoe-edge-bundle/1"
INFO, GOLDEN, MODEL = "bundle.json", "golden.npz", "model.onnx"
NAMES = (INFO, GOLDEN, MODEL)
OUTPUTS = ("hazard", "life")
MAX_BUNDLE_BYTES = 64 * 2**20  # unpacked; a model for the edge is a hundredth of it
VARIANTS = ("logs", "telemetry", "both")
NUM_LIFE = 3  # low, median, high


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When a forecast is an alert.

    Args:
        horizon_h: Of the hazard that counts; one of the bundle's.
        threshold: The hazard from which it is one.
        max_share: Share of windows with an alert above which the model itself is suspected.
    """

    horizon_h: float
    threshold: float
    max_share: float


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What ``bundle.json`` says.

    Args:
        version: Grows with every release, from 1.
        task: The task of its requests.
        features: Names of the input columns, in order.
        variant: What the inputs come from: logs, telemetry or both.
        components: Names of what may fail.
        horizons_h: Hours, rising.
        alerts: When a forecast is an alert.
        accuracy: What was measured of it, by name.
        reference: How inputs and forecasts were spread in training, by name.
        trained_until: The end of the record it was trained on, seconds since 1970; 0 if unsaid.
        optional: Features that may be unknown; the model sees not a number and makes do.
        service_period_hours: Of the visits that ``to_visit_h`` and wear are counted by, 0 for none.
        caution: Factor on the probability of no failure in a decision, by horizon; or unsaid.

    Raises:
        ConfigurationError: A field is missing or contradicts another one.
    """

    version: int
    task: str
    features: tuple[str, ...]
    variant: str
    components: tuple[str, ...]
    horizons_h: tuple[float, ...]
    alerts: AlertRule
    accuracy: Mapping[str, float]
    reference: Mapping[str, Spread] = field(default_factory=dict)
    trained_until: float = 0.0
    optional: tuple[str, ...] = ()
    service_period_hours: int = 0
    caution: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require(self.version >= 1, "version of 1 or more", self.version)
        _require(self.variant in VARIANTS, f"variant of {', '.join(VARIANTS)}", self.variant)
        is_rising = sorted(set(self.horizons_h)) == list(self.horizons_h)
        _require(bool(self.horizons_h) and is_rising, "rising horizons_h", self.horizons_h)
        _require(bool(self.components), "one component or more", self.components)
        is_distinct = 0 < len(set(self.features)) == len(self.features)
        _require(is_distinct, "distinct features", self.features)
        _require(
            self.alerts.horizon_h in self.horizons_h,
            f"alerts.horizon_h of {self.horizons_h}",
            self.alerts.horizon_h,
        )
        watched = {*self.features, HAZARD, LIFE}
        _require(set(self.reference) <= watched, "reference of features", set(self.reference))
        _require(set(self.optional) <= set(self.features), "optional features", self.optional)
        period = self.service_period_hours
        _require(period >= 0, "service_period_hours of 0 or more", period)
        is_said = len(self.caution) in (0, len(self.horizons_h))
        _require(is_said, "a caution for each of horizons_h", self.caution)

    @property
    def required(self) -> tuple[str, ...]:
        """Features without which there is no forecast."""
        return tuple(name for name in self.features if name not in self.optional)

    @property
    def width(self) -> int:
        """Columns of the input, D."""
        return len(self.features)

    @property
    def name(self) -> str:
        """The version as responses name it."""
        return f"{self.task}-{self.variant}-{self.version}"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Return what the file says.

        Raises:
            ConfigurationError: It is not such a file.
        """
        try:
            record: Any = json.loads(data)
            _require(record.pop("format", None) == FORMAT, f"format {FORMAT}", "another one")
            rule = record.pop("alerts")
            for name in ("features", "components", "horizons_h"):
                record[name] = tuple(record[name])
            for name in ("optional", "caution"):
                record[name] = tuple(record.get(name, ()))
            spreads = record.pop("reference", {})
            record["reference"] = {key: Spread.from_record(each) for key, each in spreads.items()}
            return cls(**{**record, "alerts": AlertRule(**rule)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            message = f"{INFO}: expected the fields of {FORMAT}, got {error!r:.120}"
            raise ConfigurationError(message) from error

    def to_json(self) -> bytes:
        """Return the file, canonical."""
        record = {"format": FORMAT, **asdict(self)}
        return json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Inputs with the outputs the model must give.

    Args:
        features: Inputs, float32 [N, D].
        expected: Hazards and lives side by side, as a client lays them, float32 [N, C * H + 3].
        tolerance: Absolute difference that is allowed.
    """

    features: NDArray[np.float32]
    expected: NDArray[np.float32]
    tolerance: float


def _require(condition: bool, expected: str, came: object) -> None:
    if not condition:
        message = f"{INFO}: expected {expected}, got {came!r:.120}"
        raise ConfigurationError(message)


def encode_golden(
    features: NDArray[np.float32],
    hazard: NDArray[np.float32],
    life: NDArray[np.float32],
    tolerance: float,
) -> bytes:
    """Return ``golden.npz`` of inputs [N, D] and the outputs [N, C, H] and [N, 3] to expect."""
    file = io.BytesIO()
    np.savez(file, features=features, hazard=hazard, life=life, tolerance=tolerance)
    return file.getvalue()


def decode_golden(data: bytes, info: BundleInfo) -> Golden:
    """Return what ``golden.npz`` holds.

    Raises:
        ConfigurationError: It is not such a file, or not of this bundle.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            features, hazard = arrays["features"], arrays["hazard"]
            life, tolerance = arrays["life"], float(arrays["tolerance"])
    except Exception as error:  # zipfile and numpy have many
        message = f"{GOLDEN}: expected a golden batch, got {error!r:.120}"
        raise ConfigurationError(message) from error
    num = features.shape[0]
    shapes = features.shape, hazard.shape, life.shape
    size = len(info.components), len(info.horizons_h)
    if num < 1 or shapes != ((num, info.width), (num, *size), (num, NUM_LIFE)):
        message = f"{GOLDEN}: expected [N, {info.width}], [N, {size}], [N, 3], got {shapes}"
        raise ConfigurationError(message)
    if not 0 <= tolerance < 1:
        message = f"{GOLDEN}: expected a tolerance in [0, 1), got {tolerance}"
        raise ConfigurationError(message)
    expected = np.concatenate([hazard.reshape(num, -1), life], axis=1).astype(np.float32)
    return Golden(features.astype(np.float32), expected, tolerance)


def pack(info: BundleInfo, golden: bytes, model: bytes) -> bytes:
    """Return a bundle in one piece."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in zip(NAMES, (info.to_json(), golden, model), strict=True):
            header = tarfile.TarInfo(name)  # no time, no owner
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return packed.getvalue()


def unpack(packed: bytes) -> Mapping[str, bytes]:
    """Return the files of a bundle by name.

    Raises:
        ConfigurationError: It is not the tar of a bundle.
    """
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:") as archive:
            for header in archive:
                file = archive.extractfile(header) if header.isreg() else None
                if file is None or header.name not in NAMES or len(packed) > MAX_BUNDLE_BYTES:
                    message = f"bundle: expected {', '.join(NAMES)}, got {header.name!r:.60}"
                    raise ConfigurationError(message)
                files[header.name] = file.read()
    except tarfile.TarError as error:
        message = f"bundle: expected a tar file, got {error!r:.120}"
        raise ConfigurationError(message) from error
    if files.keys() != set(NAMES):
        message = f"bundle: expected {', '.join(NAMES)}, got {', '.join(files) or 'nothing'}"
        raise ConfigurationError(message)
    return files


def write_bundle(folder: Path, packed: bytes) -> BundleInfo:
    """Write the files of a bundle into an existing folder, lasting.

    Raises:
        ConfigurationError: It is no bundle.
        OSError: The disk is full or closed to us.
    """
    files = unpack(packed)
    info = BundleInfo.from_json(files[INFO])
    decode_golden(files[GOLDEN], info)
    for name, data in files.items():
        write_whole(folder / name, data)
    return info


def read_info(folder: Path) -> BundleInfo:
    """Return what the bundle in a folder says.

    Raises:
        FileNotFoundError, ConfigurationError: There is none.
    """
    return BundleInfo.from_json((folder / INFO).read_bytes())


def read_golden(folder: Path, info: BundleInfo) -> Golden:
    """Return the golden batch of the bundle in a folder.

    Raises:
        FileNotFoundError, ConfigurationError: There is none.
    """
    return decode_golden((folder / GOLDEN).read_bytes(), info)
