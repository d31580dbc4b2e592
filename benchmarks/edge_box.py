"""A real box with a bundle: latencies of its agent, and its process as the system sees it.

The bundle is signed, fetched over HTTP, proven by its golden batch and confirmed, as on a plant.
Latencies are taken in this process around the agent's own calls; memory and the time to start
are those of ``trimoe edge run`` as a process of its own, in an environment of its own if wanted.
"""

import contextlib
import csv
import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apps.maintenance.edge.health import HOST
from apps.maintenance.edge.sources import MACHINE, TIME, Window
from apps.maintenance.edge.watch import HealthLimits
from apps.maintenance.fleet import Floats32
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import publish_bundle
from benchmarks.edge_rig import BRISK, Box, FileServer, SignedFolder, set_up_box
from cluster.errors import ConfigurationError

ROOT = Path(__file__).parents[1]
STATED_H = "2026-01-01T00:00:00Z"
PATIENT = replace(  # latency is what is measured here, so that it may not decide
    BRISK, limits=HealthLimits(window_s=0.1, min_forecasts=5, max_p99_ms=10_000.0)
)
_WARM_UP = 50  # moments that are not counted
_START_S = 60.0  # within which a box must answer
_POLL_S = 0.005
_NO_CACHE = "PYTHONDONTWRITEBYTECODE"  # an ordinary box keeps compiled modules
_SETTLE_S = 5.0  # of forecasts before memory is read


@dataclass(frozen=True, slots=True)
class Trial:
    """A box and what it is given.

    Args:
        folder: To work in.
        packed: The bundle.
        names: Of the features.
        rows: Real moments of machines, NaN where unknown [N, D].
    """

    folder: Path
    packed: bytes
    names: tuple[str, ...]
    rows: Floats32

    def set_up(self) -> None:
        """Publish the bundle and let a new box take it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        signed = SignedFolder(self.folder / "repository")
        offer = publish_bundle(signed.repository, self.packed)
        with FileServer(signed.folder) as server:
            set_up_box(self._state, signed.root, PATIENT)
            box = Box(self._state, server.url)
            outcome = box.take(offer.path)
            box.confirm()
            box.close()
        if outcome is not Outcome.SWITCHED:
            message = f"{offer.path}: expected the box to switch, got {outcome}"
            raise ConfigurationError(message)

    def latencies(self) -> Mapping[str, Sequence[float]]:
        """Return milliseconds of each moment: model, request and answer, and the agent's turn.

        ``model`` is ONNX Runtime alone; ``forecast`` a request of one moment through the agent's
        serving; ``turn`` the same with the queue on disk, flushed at every moment.
        """
        box = Box(self._state, "http://127.0.0.1:1")
        found: dict[str, list[float]] = {"model": [], "forecast": [], "turn": []}
        for row, window in zip(self.rows, self.windows(), strict=True):
            began = time.perf_counter()
            answer = box.agent.serving.forecast(row[None])
            found["forecast"].append((time.perf_counter() - began) * 1e3)
            found["model"].append(answer.took_ms)
            box.memory.add([window])
            began = time.perf_counter()
            box.agent.forecast_once()
            found["turn"].append((time.perf_counter() - began) * 1e3)
        box.close()
        return {name: values[_WARM_UP:] for name, values in found.items()}

    def windows(self) -> list[Window]:
        """Return the moments as the agent gets them; what is unknown is absent."""
        return [
            Window(f"m{idx % 100}", STATED_H, {n: v for n, v in named if not math.isnan(v)})
            for idx, row in enumerate(self.rows)
            for named in [list(zip(self.names, row.tolist(), strict=True))]
        ]

    def process(self, python: Path) -> Mapping[str, float]:
        """Return seconds to the first forecast and megabytes of ``trimoe edge run``."""
        path = self._state / "telemetry.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([MACHINE, TIME, *self.names])
            for window in self.windows():
                values = [window.features.get(name, "") for name in self.names]
                writer.writerow([window.machine, window.time, *values])
        port = _free_port()
        replace(PATIENT, health_port=port).write(self._state)
        command = [str(python), "-m", "apps.cli", "edge", "run", "--state", str(self._state)]
        began = time.perf_counter()
        running = subprocess.Popen(  # noqa: S603 - our own command
            [*command, "--csv", str(path)],
            cwd=self.folder,
            env={name: v for name, v in os.environ.items() if name != _NO_CACHE},
            stderr=subprocess.DEVNULL,
        )
        try:
            while not _windows(port):
                if time.perf_counter() - began > _START_S or running.poll() is not None:
                    message = f"expected a box that forecasts within {_START_S:g} s"
                    raise ConfigurationError(message)
                time.sleep(_POLL_S)
            start_s = time.perf_counter() - began
            time.sleep(_SETTLE_S)
            status = Path(f"/proc/{running.pid}/status").read_text()
            num_windows = _windows(port)
        finally:
            running.terminate()
            running.wait(_START_S)
        memory = {n: int(v) / 1024 for n, v in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
        return {
            "start_s": round(start_s, 3),
            "rss_mb": round(memory["VmRSS"], 1),
            "rss_peak_mb": round(memory["VmHWM"], 1),
            "windows": num_windows,
        }

    @property
    def _state(self) -> Path:
        return self.folder / "box"


@dataclass(frozen=True, slots=True)
class Install:
    """A fresh environment with ``trimoe[edge]`` from this tree, as docs/edge.md says to make it.

    Args:
        folder: Of the environment; emptied first.
    """

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self) -> float:
        """Install; return the megabytes of the environment before.

        Raises:
            ConfigurationError: The installation failed.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)  # noqa: S603
        bare = self.megabytes
        pip = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        wanted = [*pip, "--no-compile", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[edge]"]
        done = subprocess.run(wanted, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            message = f"pip: expected trimoe[edge] installed, got {done.stderr.strip()[-200:]}"
            raise ConfigurationError(message)
        return bare

    @property
    def megabytes(self) -> float:
        """What its files take on disk, in blocks as the disk gives them."""
        files = (path.lstat() for path in self.folder.rglob("*"))
        return sum(each.st_blocks * 512 for each in files) / 2**20


def quantiles(values: Sequence[float]) -> Mapping[str, float]:
    """Return p50 and p99."""
    return {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 99)}


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


def _windows(port: int) -> int:
    """Return how many windows a box has forecast; 0 while it does not answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", "/health")
        return int(json.loads(connection.getresponse().read())["windows"])
    except (OSError, http.client.HTTPException, KeyError, ValueError):
        return 0
    finally:
        connection.close()
