"""SIGKILL at random points of download, patch, switch and health watch.

    python -m benchmarks.edge_kill --kills 300 --seed 1

An agent in a process of its own takes one version after another while telemetry comes in; it
is killed at random moments and started again.  Seen after each kill: the slot that serves is
whole.  Seen at the end: the newest version serves, every window has its forecast, in order.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from apps.maintenance.edge.outbox import Outbox
from apps.maintenance.edge.slots import Slots
from apps.maintenance.edge.sources import CsvTail
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import publish_bundle
from benchmarks.edge_models import FEATURES, make_bundle
from benchmarks.edge_rig import BRISK, ONE, Box, FileServer, Request, SignedFolder, set_up_box

WINDOWS_A_START = 20
LIFE_S = (0.05, 0.35)  # of a process; an update with its watch takes about 0.3 s
_LAST_RUN_S = 30
_TELEMETRY, _PLACE = "telemetry.csv", "place.json"


@dataclass(frozen=True, slots=True)
class KillReport:
    """What was seen.

    Args:
        kills: Processes that were killed.
        broken: Starts that did not find a whole slot.
        unconfirmed: Kills that met a slot under watch.
        version: That serves at the end.
        newest: That was published.
        windows: That came.
        missing: Windows without a forecast.
        unordered: Forecasts that were first told after a later one.
        repeated: Forecasts that were told again after a kill.
        exit_code: Of the last run, which was left alone.
    """

    kills: int
    broken: int
    unconfirmed: int
    version: int
    newest: int
    windows: int
    missing: int
    unordered: int
    repeated: int
    exit_code: int | None


def append_windows(path: Path, first: int, num: int) -> None:
    """Append windows of ten machines, hour by hour, to a CSV file."""
    if not path.exists():
        path.write_text("machine,time," + ",".join(FEATURES) + "\n")
    values = ",".join(["0.1"] * (len(FEATURES) - 1) + ["0"])
    with path.open("a") as file:
        for idx in range(first, first + num):
            file.write(f"m{idx % 10},{idx:06d},{values}\n")


def climb(state: Path, url: str, goal: int) -> None:
    """Be an agent that takes one version after another."""
    box = Box(state, url, CsvTail(state / _TELEMETRY, state / _PLACE))
    version = box.slots.pointer.version
    while version < goal or box.agent.serving.is_watching:
        box.agent.forecast_once()
        outcome = box.take(f"forecast-both/{min(version + 1, goal)}.tar")
        if outcome in {Outcome.UP_TO_DATE, Outcome.KNOWN_BAD}:  # bad: killed in its watch thrice
            version += 1
    while box.agent.forecast_once():
        pass
    box.close()


def dawdle(request: Request) -> None:
    """Answer so slowly that kills meet a transfer."""
    time.sleep(0.01)
    request.send_file()


def kill_randomly(
    state: Path, signed: SignedFolder, url: str, *, num_kills: int, seed: int
) -> KillReport:
    """Kill an agent again and again; its box has version 1."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.edge_rig", "benchmarks.edge_models"])
    chance = random.Random(seed)  # noqa: S311 - no secret
    seen: Counter[str] = Counter()
    newest = 1

    def run(life_s: float) -> int | None:
        process = context.Process(target=climb, args=(state, url, newest))
        process.start()
        process.join(life_s)
        if process.is_alive():
            process.kill()
            seen["kills"] += 1
        process.join()
        return process.exitcode

    while seen["kills"] < num_kills:
        while newest < Slots(state).pointer.version + 3:
            newest += 1
            publish_bundle(signed.repository, make_bundle(newest))
        append_windows(state / _TELEMETRY, seen["windows"], WINDOWS_A_START)
        seen["windows"] += WINDOWS_A_START
        run(chance.uniform(*LIFE_S))
        slots = Slots(state)
        seen["broken"] += not slots.is_whole(slots.pointer.active)
        seen["unconfirmed"] += not slots.pointer.is_confirmed
    kills, exit_code = seen["kills"], run(_LAST_RUN_S)
    times = _times(state)
    return KillReport(
        kills=kills,
        broken=seen["broken"],
        unconfirmed=seen["unconfirmed"],
        version=Slots(state).pointer.version,
        newest=newest,
        windows=seen["windows"],
        missing=len(set(range(seen["windows"])) - set(times)),
        unordered=sum(later < earlier for earlier, later in pairwise(dict.fromkeys(times))),
        repeated=len(times) - len(set(times)),
        exit_code=exit_code,
    )


def _times(state: Path) -> list[int]:
    """Return the times of the forecasts that wait, as they were queued."""
    with Outbox(state / "outbox.db", BRISK.cap_bytes) as outbox:
        bodies = [json.loads(each.body) for each in outbox.head(10**6, 10**9)]
    return [int(each["time"]) for each in bodies if each["kind"] == "forecast"]


def main() -> int:
    """Run, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signed = SignedFolder(Path(folder) / "repository")
        publish_bundle(signed.repository, make_bundle(1))
        with FileServer(signed.folder, dawdle) as server:
            state = Path(folder) / "box"
            set_up_box(state, signed.root)
            box = Box(state, server.url)
            box.take(ONE)
            box.confirm()
            box.close()
            report = kill_randomly(state, signed, server.url, num_kills=args.kills, seed=args.seed)
    print(json.dumps(asdict(report)))
    is_good = not (report.broken or report.missing or report.unordered or report.exit_code)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
