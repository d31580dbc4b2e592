"""A repository that came on a stick: copied into the box, taken at its next sync.

It is trusted no more than a server is: the same verification follows.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from apps.maintenance.edge.durable import sync_tree
from cluster.errors import ConfigurationError

WANTED = "wanted.json"  # on the stick: which of the signed bundles it brings
MAX_STICK_BYTES = 256 * 2**20
_INBOX = "stick"


@dataclass(frozen=True, slots=True)
class Stick:
    """A stick that has arrived.

    Args:
        folder: Its copy in the box.
    """

    folder: Path

    @property
    def url(self) -> str:
        """Root of the repository on it."""
        return self.folder.absolute().as_uri()

    @property
    def wanted(self) -> str | None:
        """The bundle it brings, as it says; which is only a wish among signed ones."""
        try:
            wanted = json.loads((self.folder / WANTED).read_bytes()).get("wanted")
        except (AttributeError, OSError, ValueError):
            return None
        return wanted if isinstance(wanted, str) else None

    def discard(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)


def take_stick(source: Path, state: Path) -> None:
    """Copy a stick into a box.

    Raises:
        FileNotFoundError: There is no repository on it.
        ConfigurationError: It holds more than a box takes, or links.
    """
    if not (source / "metadata" / "timestamp.json").exists():
        message = f"{source}: expected a stick made by trimoe sync export"
        raise FileNotFoundError(message)
    paths = list(source.rglob("*"))
    num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    if num_bytes > MAX_STICK_BYTES or any(path.is_symlink() for path in paths):
        message = (
            f"{source}: expected {MAX_STICK_BYTES} bytes at most and no links, got {num_bytes}"
        )
        raise ConfigurationError(message)
    draft = state / f"{_INBOX}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    sync_tree(draft)
    shutil.rmtree(state / _INBOX, ignore_errors=True)
    draft.rename(state / _INBOX)


def arrived_stick(state: Path) -> Stick | None:
    """Return the stick that waits in a box, if any."""
    folder = state / _INBOX
    return Stick(folder) if folder.is_dir() else None
