"""The same batch in supervised Ray actors: one is killed, and one case kills each of its own."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apps.imaging.batch.driver import run_batch
from apps.imaging.batch.evidence import signing_key
from apps.imaging.batch.plan import Batch
from apps.imaging.batch.workers import WorkerPlan, WorkerSettings
from tests.apps.imaging.batch.small_batch import APPLICATION, SilentClient, discover, make_input

if TYPE_CHECKING:
    from cluster.workers import WorkerGroup

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture
def local_ray() -> Iterator[None]:
    """A local Ray without a platform on it."""
    from cluster.platform import PlatformConfig, prepare_environment, start_ray

    prepare_environment()
    import ray

    start_ray(PlatformConfig())
    yield
    ray.shutdown()


@contextmanager
def hire(plan: WorkerPlan) -> "Iterator[WorkerGroup]":
    from cluster.workers import run_workers

    group = run_workers(plan, 2, dial=SilentClient)
    try:
        yield group
    finally:
        group.stop(drain_s=10.0)


@pytest.mark.usefixtures("local_ray")
def test_lost_actors_cost_no_case(tmp_path: Path) -> None:
    cases = [{"seconds": 0.3} for _ in range(10)]
    folder = make_input(tmp_path / "in", [*cases, {"how": "poison"}])
    inventory = discover(folder)
    victim = inventory.sources[4].case_id

    def kill() -> None:
        path = tmp_path / "locks" / victim
        deadline_s = time.monotonic() + 60
        while not (path.exists() and path.read_text()) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.kill(int(path.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run_batch(
        Batch(
            APPLICATION,
            folder,
            inventory,
            tmp_path / "out",
            workers=WorkerSettings(in_flight=1, look_s=0.05),
        ),
        hire,
        signing_key(tmp_path / "key.pem"),
        stopping=threading.Event(),
        show=lambda _: None,
    )
    killer.join()
    assert outcome.manifest is not None
    statuses = {case["source"]: case["status"] for case in outcome.manifest["cases"]}
    assert statuses == {
        f"{number:03d}.json": "quarantined" if number == 10 else "correct" for number in range(11)
    }
    attempts = {case["case_id"]: case["attempts"] for case in outcome.manifest["cases"]}
    assert attempts.pop(inventory.sources[10].case_id) == 3
    assert attempts.pop(victim) == 2
    assert set(attempts.values()) == {1}
    assert list((tmp_path / "doubled").iterdir()) == []
