"""One case through a client: what is refused, and what is raised when windows fail."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from apps.imaging.case import Case
from apps.imaging.outputs.settings import Kind, OutputSettings
from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.source import RejectedError
from apps.imaging.reasons import Reason, Status
from apps.imaging.segmentation import IN_FLIGHT, ORGANS, measure, segment
from apps.imaging.service import CaseService
from apps.imaging.stack import SliceStack
from benchmarks.imaging_cases import write_series
from cluster.errors import DeadlineExceededError
from cluster.schemas import InferRequest, InferResponse
from tests.apps.imaging.test_service import CALIBRATION, BoneClient

SMALL = PhantomShape(slices=60, pixels=64, slice_mm=6.0, pixel_mm=6.4)


def case_of(stack: SliceStack, *reasons: Reason) -> Case:
    return Case("c0", "study", "", Status.REPAIRED, reasons, stack)


def air_with_crumbs() -> SliceStack:
    """Single dense pixels far apart: readable as Hounsfield units, air on the model's grid."""
    hu = np.random.default_rng(1).normal(-1000, 5, (40, 64, 64)).round().astype(np.int16)
    hu[:, ::6, ::6] = 60
    origins = np.outer(np.arange(40.0), np.array([0.0, 0.0, 1.0]))
    row, column = np.eye(3)[0], np.eye(3)[1]
    return SliceStack(hu, origins, row, column, (1.0, 1.0), np.zeros(40, dtype=np.bool_))


class FailingClient(BoneClient):
    """Answers no window, and raises for all of those that are under way at once."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.num_asked = 0
        self._error = error
        self._are_all_there = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.num_asked += 1
        if self.num_asked == IN_FLIGHT:
            self._are_all_there.set()
        await self._are_all_there.wait()
        raise self._error


@pytest.mark.parametrize("error", [DeadlineExceededError("late"), ValueError("a defect")])
def test_windows_that_fail_together_raise_one_plain_error(error: Exception) -> None:
    stack, _ = make_phantom(2, SMALL)
    client = FailingClient(error)
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(segment(case_of(stack), client, CALIBRATION))


def test_organs_are_measured_by_the_slices_own_pixels() -> None:
    """Unequal steps, a stray voxel, an organ of one voxel, and organs without any."""
    rng = np.random.default_rng(3)
    shape = (6, 20, 30)
    heights = np.array([0.0, 2.0, 4.0, 9.0, 14.0, 19.0])
    origins = np.outer(heights, np.array([0.0, 0.0, 1.0]))
    hu = rng.integers(-900, 1400, shape).astype(np.int16)
    row, column = np.eye(3)[0], np.eye(3)[1]
    stack = SliceStack(hu, origins, row, column, (1.5, 0.8), np.zeros(6, dtype=np.bool_))
    labels = np.zeros(shape, dtype=np.uint8)
    labels[1:4, 5:12, 3:9] = 1
    labels[5, 19, 29] = 1
    labels[2, 0, 7] = 6
    sure = rng.integers(1, 256, shape).astype(np.uint8)
    sure[2, 0, 7] = 255
    organs = measure(stack, labels, sure, CALIBRATION)
    assert [organ.name for organ in organs] == list(ORGANS)
    first, inside = organs[0], labels == 1
    depth_mm = np.array([2.0, 2.0, 3.5, 5.0, 5.0, 5.0])
    voxel_ml = 1.5 * 0.8 / 1000 * depth_mm[:, None, None]
    assert first.volume_ml == pytest.approx((voxel_ml * inside).sum())
    assert first.mean_hu == pytest.approx(hu[inside].mean())
    assert first.sd_hu == pytest.approx(hu[inside].astype(np.float64).std())
    assert first.confidence == pytest.approx(sure[inside].mean() / 255)
    assert first.box == (1, 5, 3, 6, 20, 30)
    larynx = organs[ORGANS.index("Larynx")]
    assert larynx.box == (2, 0, 7, 3, 1, 8)
    assert (larynx.confidence, larynx.is_sure, larynx.sd_hu) == (1.0, True, 0.0)
    assert [o.box for o in organs if o not in (first, larynx)] == [None] * 5


def test_a_case_of_air_is_refused_without_a_question() -> None:
    client = FailingClient(ValueError())
    with pytest.raises(RejectedError, match=r"BODY_MISSING: expected a body, all is air below"):
        asyncio.run(segment(case_of(air_with_crumbs()), client, CALIBRATION))
    assert client.num_asked == 0


def test_a_case_of_air_ends_in_quarantine_with_its_report(tmp_path: Path) -> None:
    write_series(air_with_crumbs(), tmp_path / "in" / "air", "air")
    (source,) = discover(tmp_path / "in", Bounds()).sources
    outputs = OutputSettings(b"0123456789abcdef", frozenset({Kind.REPORT, Kind.NIFTI}))
    service = CaseService(Bounds(), CALIBRATION, outputs)
    summary = asyncio.run(service(source, tmp_path / "out", BoneClient()))
    assert summary.status is Status.QUARANTINED
    assert [reason.code for reason in summary.reasons] == ["BODY_MISSING"]
    assert (summary.num_slices, summary.model_version) == (0, "")
    assert summary.outputs == {"report": "report.html"}
    assert "BODY_MISSING" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_the_cause_of_a_quarantine_comes_before_what_was_repaired() -> None:
    repair, cause = Reason("DUPLICATE_DROPPED", "1 slice"), Reason("BODY_MISSING", "air")
    left = case_of(air_with_crumbs(), repair).quarantined(cause)
    assert (left.status, left.stack, left.headers) == (Status.QUARANTINED, None, ())
    assert left.reasons == (cause, repair)
