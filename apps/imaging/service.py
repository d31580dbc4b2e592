"""The imaging service: one case is read, segmented and written; a batch of them is reported."""

import argparse
import asyncio
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apps.imaging.batch.evidence import OWN, default_key_path
from apps.imaging.batch.manifest import write_whole
from apps.imaging.batch.process import Application, Record
from apps.imaging.batch.verification import verify_command
from apps.imaging.calibration import FILE, Calibration
from apps.imaging.launch import MODEL, run_command
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import CaseSummary, summarise
from apps.imaging.outputs.write import write_batch, write_case
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reading.source import RejectedError, Source
from apps.imaging.segmentation import TASK, Stopwatch, segment
from cluster.client import Client
from cluster.errors import ConfigurationError

CALIBRATION = Path("models") / MODEL / FILE
UID_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class CaseService:
    """Runs one case; a ``process.Process``.

    Args:
        bounds: Limits of reading.
        calibration: Of the model that the platform serves.
        outputs: What is written.
    """

    bounds: Bounds
    calibration: Calibration
    outputs: OutputSettings

    async def __call__(self, source: Source, directory: Path, client: Client, /) -> CaseSummary:
        """Read, segment and write a case.

        Raises:
            UnavailableError, InvalidRequestError: See ``segment``.
            OutputError: See ``write_case``.
        """
        watch = Stopwatch()
        case = await asyncio.to_thread(read_case, source, self.bounds)
        watch.lap("read")
        findings = None
        if case.stack is not None:
            try:
                findings = await segment(case, client, self.calibration)
            except RejectedError as error:
                case = case.quarantined(error.reason)
        seconds = dict(watch.seconds) | dict(findings.seconds if findings else {})
        watch = Stopwatch()
        written = await asyncio.to_thread(write_case, case, findings, directory, self.outputs)
        watch.lap("write")
        return summarise(case, findings, written, seconds | watch.seconds)


def make_application(calibration: Calibration, outputs: OutputSettings) -> Application:
    """Return what a batch of CT cases is about."""
    bounds = Bounds()
    return Application(
        discover=partial(discover, bounds=bounds),
        process=CaseService(bounds, calibration, outputs),
        report=partial(_report, outputs),
        settings=_settings(calibration, outputs),
    )


def _report(
    outputs: OutputSettings, summaries: Sequence[CaseSummary], directory: Path, busy_s: float, /
) -> Mapping[str, str]:
    return write_batch(summaries, directory, outputs, busy_s)


def _settings(calibration: Calibration, outputs: OutputSettings) -> Record:
    """Return what decides over the results, without the secret itself."""
    return {
        "task": TASK,
        "calibration": hashlib.sha256(repr(calibration).encode()).hexdigest()[:16],
        "outputs": sorted(outputs.kinds),
        "keep_identity": outputs.keep_identity,
        "uid_key": hashlib.sha256(outputs.uid_key).hexdigest()[:16],
    }


def uid_key(path: Path) -> bytes:
    """Return the site's secret for pseudonyms; make one, for its owner alone, if there is none.

    Raises:
        ConfigurationError: Others may read it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, secrets.token_bytes(UID_KEY_BYTES), OWN)
    mode = path.stat().st_mode & 0o777
    if mode & ~OWN:
        message = f"key of pseudonyms: expected mode 600, got {mode:o}; chmod 600 it"
        raise ConfigurationError(message)
    return path.read_bytes()


def _application() -> Application:
    key = uid_key(default_key_path().with_name("imaging_uid_key"))
    try:
        calibration = Calibration.load(CALIBRATION)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return make_application(calibration, OutputSettings(key))


def run(args: argparse.Namespace) -> int:
    """Run ``trimoe imaging run``."""
    return run_command(args, _application())


def verify(args: argparse.Namespace) -> int:
    """Run ``trimoe imaging verify``."""
    return verify_command(args, _application())
