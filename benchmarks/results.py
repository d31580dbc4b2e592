"""Rows of measurements: appended to a file per subject, machine and month, never overwritten."""

import csv
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def append_row(folder: Path, subject: str, row: Mapping[str, object]) -> Path:
    """Append a row with time, commit and machine; return the file."""
    facts: dict[str, object] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **row,
    }
    path = folder / f"{subject}_{platform.machine()}_{time.strftime('%Y%m', time.gmtime())}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, facts.keys())
        if is_new:
            writer.writeheader()
        writer.writerow(facts)
    return path


def _commit() -> str:
    if shutil.which("git") is None:
        return "none"
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - git
    return done.stdout.strip() or "none"
