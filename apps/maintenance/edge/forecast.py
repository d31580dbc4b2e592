"""Rows in, forecasts out: the model of a slot behind the client every application uses.

Legend: N windows, D features, C components, H horizons.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.bundle import MODEL, OUTPUTS, BundleInfo, Golden, read_golden, read_info
from apps.maintenance.sync.outcomes import Outcome, RefusedError
from cluster.errors import CheckpointError, ConfigurationError, UnavailableError
from cluster.onnx import OnnxClient
from cluster.schemas import InferRequest, ServiceClass

TENANT = "edge"
_LIFE_SLACK = 1e-3  # share by which ends of an interval may cross: rounding


@dataclass(frozen=True, slots=True, eq=False)
class Forecasts:
    """What a model says of windows.

    Args:
        hazard: Probability of a failure within each horizon, [N, C, H].
        life: Remaining useful life, hours: low, median, high, [N, 3].
        is_alert: Whether the alert rule of the bundle is met, [N, C].
        is_sane: Finite, probabilities in [0, 1], the interval in order, [N].
        version: Of the model.
        took_ms: Of the whole request.
    """

    hazard: NDArray[np.float32]
    life: NDArray[np.float32]
    is_alert: NDArray[np.bool_]
    is_sane: NDArray[np.bool_]
    version: str
    took_ms: float


class Forecaster:
    """The model of one bundle, loaded.

    Args:
        folder: Holds the files of a bundle.

    Raises:
        RefusedError: They are no bundle, or the model does not load.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.info: BundleInfo = read_info(folder)
            self.golden: Golden = read_golden(folder, self.info)
        except (OSError, ConfigurationError) as error:
            raise RefusedError(Outcome.BUNDLE_INVALID, str(error)) from error
        try:
            self._client = OnnxClient(
                folder / MODEL, task=self.info.task, version=self.info.name, outputs=OUTPUTS
            )
        except CheckpointError as error:
            raise RefusedError(Outcome.MODEL_FAILED, str(error)) from error

    def forecast(self, features: NDArray[np.float32]) -> Forecasts:
        """Return the forecasts of windows [N, D].

        Raises:
            InvalidRequestError: They have another width.
            UnavailableError: The model failed.
        """
        num = features.shape[0]
        request = InferRequest(
            request_id=uuid.uuid4().hex,
            tenant=TENANT,
            task=self.info.task,
            features=features,
            cu_seqlens=np.arange(num + 1, dtype=np.int32),
            service_class=ServiceClass.INTERACTIVE,
        )
        response = self._client.answer(request)
        size = len(self.info.components), len(self.info.horizons_h)
        num_hazards = size[0] * size[1]
        if response.outputs.shape[1] != num_hazards + 3:
            message = f"model {self.info.name}: expected {num_hazards} hazards and 3 ends of life"
            raise UnavailableError(message + f", got {response.outputs.shape[1]} columns")
        hazard = response.outputs[:, :num_hazards].reshape(num, *size)
        life = response.outputs[:, num_hazards:]
        horizon_idx = self.info.horizons_h.index(self.info.alerts.horizon_h)
        return Forecasts(
            hazard,
            life,
            hazard[:, :, horizon_idx] >= self.info.alerts.threshold,
            _is_sane(hazard, life),
            response.model_version,
            response.timings.compute_ms,
        )

    def prove(self) -> float:
        """Run the golden batch; return the largest difference from what it expects.

        Raises:
            RefusedError: The model fails on it, or differs by more than the tolerance.
        """
        try:
            found = self.forecast(self.golden.features)
        except UnavailableError as error:
            raise RefusedError(Outcome.MODEL_FAILED, str(error)) from error
        hazard = found.hazard.reshape(found.life.shape[0], -1)
        outputs = np.concatenate([hazard, found.life], axis=1)
        worst = float(np.abs(outputs - self.golden.expected).max())
        if not worst <= self.golden.tolerance:  # NaN is not either
            detail = f"expected outputs within {self.golden.tolerance:g}, got {worst:g} away"
            raise RefusedError(Outcome.GOLDEN_MISMATCH, f"{self.info.name}: {detail}")
        return worst


def _is_sane(hazard: NDArray[np.float32], life: NDArray[np.float32]) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        is_prob = ((hazard >= 0) & (hazard <= 1)).all(axis=(1, 2))
        slack = _LIFE_SLACK * np.abs(life).max(axis=1, keepdims=True)
        is_ordered = (np.diff(life, axis=1) >= -slack).all(axis=1)
        is_finite = np.isfinite(life).all(axis=1)
    return np.asarray(is_prob & is_ordered & is_finite)
