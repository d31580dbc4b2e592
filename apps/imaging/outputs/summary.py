"""What is kept of a case for the batch: small, and the same after a trip through JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from apps.imaging.case import Case
from apps.imaging.finding import Findings, Organ
from apps.imaging.reasons import Reason, Status


@dataclass(frozen=True, slots=True)
class CaseSummary:
    """One case in a manifest.

    ``source`` and ``series_uid`` are those of the input: the manifest is where a site finds
    its series again.  The batch's report, CSV and worklist hold neither, unless identity is kept.

    Args:
        case_id: As in ``Case``, like the five that follow.
        source: Of the input.
        series_uid: Of the input.
        status: What became of it.
        reasons: Repairs, or the cause of its quarantine.
        num_slices: 0 if quarantined.
        slice_positions_mm: Along the normal.
        organs: As found; empty if quarantined.
        unusual: Out-of-distribution score; None if quarantined.
        confidence_case: None if quarantined.
        is_referred: Whether a person must see it; a quarantined case always.
        model_version: Empty if quarantined.
        seconds: Time of each stage.
        outputs: Files by name, relative to the batch's directory.
    """

    case_id: str
    source: str
    series_uid: str
    status: Status
    reasons: tuple[Reason, ...] = ()
    num_slices: int = 0
    slice_positions_mm: tuple[float, ...] = ()
    organs: tuple[Organ, ...] = ()
    unusual: float | None = None
    confidence_case: float | None = None
    is_referred: bool = True
    model_version: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def cost_mm(self) -> float:
        """How far anatomy may be from where it is said to be, over all repairs."""
        return max((reason.cost_mm for reason in self.reasons), default=0.0)

    @property
    def doubtful_organs(self) -> tuple[str, ...]:
        """Names of organs without voxels, or not alone in their conformal set."""
        return tuple(o.name for o in self.organs if o.box is None or not o.is_sure)

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON knows; what is not a number becomes null."""
        record = asdict(self)
        record["status"] = self.status.value
        record["organs"] = [
            {key: _null_if_nan(value) for key, value in organ.items()} for organ in record["organs"]
        ]
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in record.items()
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Return what ``as_json`` was called on.

        Raises:
            TypeError: A field is missing, or one is unknown.
            ValueError: The status is none.
        """
        values = dict(record)
        values["status"] = Status(values["status"])
        values["reasons"] = tuple(Reason(**reason) for reason in values["reasons"])
        values["organs"] = tuple(_organ(organ) for organ in values["organs"])
        values["slice_positions_mm"] = tuple(values["slice_positions_mm"])
        return cls(**values)


def summarise(
    case: Case, findings: Findings | None, outputs: Mapping[str, str], seconds: Mapping[str, float]
) -> CaseSummary:
    """Return what is kept of a case.

    Args:
        case: As read.
        findings: None if quarantined.
        outputs: Files by name, relative to the batch's directory.
        seconds: Time of each stage, those after the model included.
    """
    summary = CaseSummary(
        case_id=case.case_id,
        source=case.source,
        series_uid=case.series_uid,
        status=case.status,
        reasons=case.reasons,
        seconds=dict(seconds),
        outputs=dict(outputs),
    )
    if findings is None or case.stack is None:
        return summary
    return replace(
        summary,
        num_slices=case.stack.num_slices,
        slice_positions_mm=tuple(case.stack.positions_mm.round(4).tolist()),
        organs=findings.organs,
        unusual=findings.unusual,
        confidence_case=findings.confidence_case,
        is_referred=findings.is_referred,
        model_version=findings.model_version,
    )


def _null_if_nan(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _organ(record: Mapping[str, Any]) -> Organ:
    box = record["box"]
    numbers = {key: record[key] for key in ("volume_ml", "mean_hu", "sd_hu", "confidence")}
    numbers = {key: math.nan if value is None else value for key, value in numbers.items()}
    return Organ(**{**record, **numbers, "box": None if box is None else tuple(box)})
