"""The CT batch of ``trimoe demo --all``: generated cases through the real job.

Cases are phantoms; no figure speaks about people.
"""

import secrets
import threading
from pathlib import Path
from typing import NamedTuple

import nibabel
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from apps.imaging.batch.driver import Hire, Outcome, run_batch
from apps.imaging.batch.plan import Batch
from apps.imaging.batch.progress import Show
from apps.imaging.calibration import FILE, Calibration
from apps.imaging.outputs.label_map import volume_grid
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.phantom import make_phantom
from apps.imaging.service import UID_KEY_BYTES, make_application
from cluster.errors import ConfigurationError


def write_cases(num_cases: int, folder: Path) -> None:
    """Write so many phantoms as NIfTI files into a folder, which is made."""
    folder.mkdir(parents=True)
    for seed in range(num_cases):
        stack, _ = make_phantom(seed)
        grid = volume_grid(stack)
        if grid is None:
            message = f"phantom {seed}: expected slices on a line"
            raise ValueError(message)
        image = nibabel.Nifti1Image(stack.hu.transpose(2, 1, 0), grid.affine)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / f"phantom-{seed:02d}.nii.gz")


def read_calibration(model: Path) -> Calibration:
    """Return the calibration beside the weights in a folder.

    Raises:
        ConfigurationError: There is none, or it is not such a file.
    """
    try:
        return Calibration.load(model / FILE)
    except (FileNotFoundError, ValueError) as error:
        message = f"{model.name}: expected {FILE} beside the weights, got {error}"
        raise ConfigurationError(message) from error


class Desk(NamedTuple):
    """Where a batch runs.

    Args:
        hire: Runs the workers.
        stopping: Set to end early.
        show: Takes a tally a few times a second.
    """

    hire: Hire
    stopping: threading.Event
    show: Show


def run_cases(studies: Path, out: Path, calibration: Calibration, desk: Desk) -> Outcome:
    """Run the cases of a folder as ``trimoe imaging run`` does, with keys of this run alone.

    Args:
        studies: Input.
        out: Output directory, made.
        calibration: Of the model that the platform serves.
        desk: Where it runs.

    Raises:
        ConfigurationError, UnavailableError: See ``run_batch``.
    """
    outputs = OutputSettings(secrets.token_bytes(UID_KEY_BYTES))
    application = make_application(calibration, outputs)
    batch = Batch(application, studies, application.discover(studies), out)
    key = Ed25519PrivateKey.generate()
    return run_batch(batch, desk.hire, key, stopping=desk.stopping, show=desk.show)
