"""Where things lie in the output directory of a batch.

manifest.json, manifest.sig, manifest.pub     what came of it, its signature, its public key
index.html, ...                               the report of the batch
cases/<case id>/                              outputs of a case, there as a whole or not at all
batch/journal                                 what has happened (``journal``)
batch/leases/<process>                        who is alive (``lease``)
batch/attempts/<case id>.<fence>/             outputs of an attempt that runs
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one output directory.

    Args:
        root: The directory; absolute.
    """

    root: Path

    @property
    def manifest(self) -> Path:
        """What came of the batch."""
        return self.root / "manifest.json"

    @property
    def signature(self) -> Path:
        """Of the manifest: 64 bytes."""
        return self.root / "manifest.sig"

    @property
    def public_key(self) -> Path:
        """That the signature is checked with, PEM."""
        return self.root / "manifest.pub"

    @property
    def cases(self) -> Path:
        """Outputs of cases."""
        return self.root / "cases"

    @property
    def journal(self) -> Path:
        """What has happened."""
        return self.root / "batch" / "journal"

    @property
    def leases(self) -> Path:
        """Who is alive."""
        return self.root / "batch" / "leases"

    @property
    def attempts(self) -> Path:
        """Outputs of attempts that run."""
        return self.root / "batch" / "attempts"

    def case(self, case_id: str) -> Path:
        """Return the directory of a case."""
        return self.cases / case_id

    def attempt(self, case_id: str, fence: int) -> Path:
        """Return the directory of an attempt."""
        return self.attempts / f"{case_id}.{fence}"

    def make(self) -> None:
        """Make the directories that are missing."""
        for folder in (self.cases, self.leases, self.attempts):
            folder.mkdir(parents=True, exist_ok=True)
