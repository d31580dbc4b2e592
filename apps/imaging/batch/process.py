"""What a batch runs for every case: the seam between the job and what it is about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Inventory, Source
from cluster.client import Client

Record: TypeAlias = Mapping[str, Any]  # of JSON: text, finite numbers, lists, records


class Process(Protocol):
    """Reads, segments and writes one case; picklable."""

    async def __call__(self, source: Source, directory: Path, client: Client, /) -> CaseSummary:
        """Process a case; its heavy parts belong into threads.

        Args:
            source: The case.
            directory: Empty, of this attempt alone; what is in it at the end is kept.
            client: Reaches the model.

        Returns:
            What is kept of it, its outputs relative to ``directory``.

        Raises:
            UnavailableError: The platform did not answer; the case is tried again.
            ConfigurationError, UnknownModelError: No case can be processed; the batch ends.
            Exception: Anything else counts against the case.
        """
        ...


class Report(Protocol):
    """Writes the report of a batch."""

    def __call__(
        self, summaries: Sequence[CaseSummary], directory: Path, busy_s: float, /
    ) -> Mapping[str, str]:
        """Write it into the directory of the batch; return name -> path relative to that.

        Args:
            summaries: One for each case that has a result, outputs relative to the directory.
            directory: Of the batch.
            busy_s: How long cases were under way.
        """
        ...


@dataclass(frozen=True, slots=True)
class Application:
    """What a batch is about.

    Args:
        discover: Finds the cases below a path.
        process: Runs a case.
        report: Writes the report of a batch.
        settings: What else decides over the results, as JSON; the same whenever it is resumed.
    """

    discover: Callable[[Path], Inventory]
    process: Process
    report: Report
    settings: Record = field(default_factory=dict)
