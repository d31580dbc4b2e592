"""The whole platform with the shipped weights, as a user starts it: through a real Kafka."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.real_kafka import RealKafka

TRANSACTIONS = 3000
KEYS = {"inputs", "decisions", "dead_letters", "tx_per_s", "p50_ms", "p99_ms", "seconds"}


@pytest.mark.kafka
@pytest.mark.ray
def test_every_transaction_of_the_demo_is_answered_once(
    real_kafka: RealKafka, tmp_path: Path
) -> None:
    """Inputs are decisions plus dead letters, frauds are caught, and the demo ends by itself."""
    report = tmp_path / "demo.json"
    command = [sys.executable, "-m", "apps.cli", "demo", "--json", str(report)]
    command += ["--transactions", str(TRANSACTIONS), "--rate", "300"]
    command += ["--bootstrap-servers", real_kafka.bootstrap_servers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(report.read_text())
    assert set(figures) == KEYS
    assert figures["inputs"] == figures["decisions"] + figures["dead_letters"] >= TRANSACTIONS
    assert figures["dead_letters"] > 0
    caught = next(line for line in done.stdout.splitlines() if line.startswith("fraud"))
    num_caught, num_frauds = (int(word) for word in caught.split() if word.isdigit())
    assert num_caught > num_frauds / 3
