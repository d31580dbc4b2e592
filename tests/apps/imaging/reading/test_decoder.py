import copy
import random
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.decoder import Decoder
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reading.source import RejectedError
from apps.imaging.reasons import Status
from tests.apps.imaging.reading import faults
from tests.apps.imaging.reading.faults import as_bytes

NUM_DAMAGED = 8


def test_a_broken_image_is_refused_and_the_next_one_decoded() -> None:
    slice_ = faults.generated_slices()[0]
    expected = slice_.pixel_array.copy()
    slice_.compress(JPEG2000Lossless, generate_instance_uid=False)
    raw = as_bytes(slice_)
    at = raw.index(b"\xff\x4f\xff\x51")
    with Decoder() as decoder:
        with pytest.raises(RejectedError, match="PIXELS_UNREADABLE"):
            decoder.decode(raw[: at + 60] + bytes(len(raw) - at - 60), JPEG2000Lossless)
        assert np.array_equal(decoder.decode(raw, JPEG2000Lossless), expected)


def test_a_decoder_that_has_ended_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    slice_ = faults.generated_slices()[0]
    slice_.compress(RLELossless, generate_instance_uid=False)
    raw = as_bytes(slice_)
    with Decoder() as decoder:
        monkeypatch.setattr("sys.executable", "/bin/false")  # ends at once
        with pytest.raises(RejectedError, match="decoding failed by"):
            decoder.decode(raw, RLELossless)
        monkeypatch.undo()
        assert decoder.decode(raw, RLELossless).shape == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_damaged_files_have_an_outcome_and_never_an_error_of_ours(
    syntax: str | None, tmp_path: Path
) -> None:
    rng = random.Random(11)
    slices = faults.generated_slices()[:6]
    if syntax:
        for slice_ in slices:
            slice_.compress(syntax, generate_instance_uid=False)
    files = [as_bytes(slice_) for slice_ in copy.deepcopy(slices)]
    for trial in range(NUM_DAMAGED):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for k, data in enumerate(files):
            damaged = bytearray(data)
            for _ in range(rng.randint(0, 3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (folder / f"{k}.dcm").write_bytes(damaged)
        for source in discover(folder, Bounds()).sources:
            case = read_case(source, Bounds())
            assert (case.stack is None) == (case.status is Status.QUARANTINED)
            assert (case.reasons == ()) == (case.status is Status.CORRECT)
            assert "READING_FAILED" not in {reason.code for reason in case.reasons}
