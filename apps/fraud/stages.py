"""Where the time of a worker goes: seconds and items per stage, cheap enough to stay on."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StageClock:
    """Sums wall time per named stage; two clock reads per stage and poll."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.items: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, stage: str, num_items: int = 0) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin_s
            self.items[stage] += num_items

    def report(self) -> dict[str, dict[str, float]]:
        """Return seconds, items and microseconds per item by stage."""
        return {
            stage: {
                "seconds": round(seconds, 4),
                "items": self.items[stage],
                "us_per_item": round(1e6 * seconds / max(1, self.items[stage]), 2),
            }
            for stage, seconds in self.seconds.items()
        }


def write_report(directory: Path, index: int, stages: StageClock) -> None:
    """Write the stage times of a worker as ``stages-INDEX.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"stages-{index}.json").write_text(json.dumps(stages.report(), indent=2))
