"""Parts that the imaging measurements share: outputs, and a desk to run the real command at."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from apps.imaging.calibration import FILE
from apps.imaging.launch import MODEL
from apps.imaging.outputs.settings import OutputSettings
from cluster.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "models"
OUTPUTS = OutputSettings(b"of measurements only")


def models_of(given: Path | None) -> Path:
    """Return the folder of models to measure, the shipped ones if none is given.

    Raises:
        ConfigurationError: It has no organ weights with their calibration.
    """
    models = (given or SHIPPED).resolve()
    if not (models / MODEL / FILE).is_file():
        message = f"models: expected {MODEL}/ with weights and {FILE} in {models.name}, got none; "
        raise ConfigurationError(message + "make them with trimoe imaging train, pass --models")
    return models


@dataclass(frozen=True, slots=True)
class Desk:
    """A working directory of ``trimoe imaging``, with models and with keys of its own.

    Args:
        folder: The directory.
    """

    folder: Path

    @classmethod
    def at(cls, folder: Path, models: Path) -> Self:
        """Return a desk in a folder, which is made, where these models are found."""
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "models"
        link.unlink(missing_ok=True)
        link.symlink_to(models.resolve(), target_is_directory=True)
        return cls(folder)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Start ``trimoe imaging`` with these words."""
        own = {"HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder / "keys")}
        with (self.folder / "said").open("w", encoding="utf-8") as said:
            return subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "apps.cli", "imaging", *words],
                cwd=self.folder,
                env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )

    @property
    def said(self) -> str:
        """What the command that was started last has said so far."""
        return (self.folder / "said").read_text(encoding="utf-8")

    def run(self, *words: str) -> None:
        """Run ``trimoe imaging`` with these words to its end.

        Raises:
            ConfigurationError: It failed.
        """
        status = self.start(*words).wait()
        if status != 0:
            last = " ".join(self.said.splitlines()[-3:])
            message = f"trimoe imaging {words[0]}: expected success, got status {status}: {last}"
            raise ConfigurationError(message)
