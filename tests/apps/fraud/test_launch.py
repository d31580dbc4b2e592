"""A worker is built from what its plan carries, on any node."""

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest

from apps.fraud.decision import load_policy
from apps.fraud.launch import WorkerPlan, default_schemas
from apps.fraud.settings import ServiceSettings
from apps.fraud.transport import KafkaSettings
from benchmarks.steady_client import SteadyClient


@dataclass
class NoStream:
    """Connects to nothing."""

    settings: KafkaSettings


def test_the_warm_up_table_travels_with_the_plan_and_goes_with_the_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file of the command's machine is not on the node of the worker."""
    monkeypatch.setattr("apps.fraud.launch.KafkaStream", NoStream)
    settings = ServiceSettings(warm_from=tmp_path / "nowhere" / "history.parquet")
    kafka = KafkaSettings("127.0.0.1:1")
    plan = WorkerPlan(kafka, settings, load_policy(), default_schemas(), history=b"rows")
    service = plan(1, 3, SteadyClient())
    unpacked = service.settings.warm_from
    assert unpacked is not None
    assert (unpacked.name, unpacked.read_bytes()) == ("history.parquet", b"rows")
    assert (service.settings.index, service.settings.num_workers) == (1, 3)
    del service
    gc.collect()
    assert not unpacked.parent.exists()
