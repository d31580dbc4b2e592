"""One measured run: a load process on one side, the answers on the other.

The first ``warm_up`` transactions show that workers and model are up; the clock
starts after their answers, and they are left out of the latencies.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from apps.fraud.load import NO_FAULTS, Faults, Sent
from apps.fraud.settings import Topics
from apps.fraud.watch import Answers, Watch

_LOOK_S = 0.1
_LOAD_EXIT_S = 60.0


class Offer(NamedTuple):
    """What is sent.

    Args:
        table: Transactions with labels, in a file of the handbook's columns.
        rate_tx_s: Transactions per second.
        warm_up: Transactions sent first.
        faults: Wrong and repeated messages among the rest.
    """

    table: Path
    rate_tx_s: float
    warm_up: int = 200
    faults: Faults = NO_FAULTS


class Outcome(NamedTuple):
    """What came of a run.

    Args:
        sent: By the load process after the warm-up.
        answers: All that were read, warm-up included.
        inputs: Transactions sent, warm-up included.
        begin_ms: Kafka time at which the measured part began.
        seconds: From there to the last decision, between Kafka's timestamps.
    """

    sent: Sent
    answers: Answers
    inputs: int
    begin_ms: int
    seconds: float

    @property
    def num_answers(self) -> int:
        """Decisions and dead letters that were read."""
        return self.answers.num_decisions + self.answers.num_dead_letters

    @property
    def tx_per_s(self) -> float:
        """Answered transactions per second of the measured part."""
        return self.sent.transactions / max(self.seconds, 1e-9)


class LoadProcess:
    """The load generator in its own process; ``begin`` ends its warm-up pause."""

    def __init__(
        self, bootstrap_servers: str, kafka_config: Sequence[str], topics: Topics, offer: Offer
    ) -> None:
        command = [sys.executable, "-m", "apps.fraud.load"]
        command += ["--bootstrap-servers", bootstrap_servers, "--table", str(offer.table)]
        command += ["--rate", str(offer.rate_tx_s), "--warm-up", str(offer.warm_up)]
        command += ["--transactions-topic", topics.transactions, "--labels-topic", topics.labels]
        command += ["--malformed", str(offer.faults.malformed)]
        command += ["--duplicates", str(offer.faults.duplicates)]
        command += [part for pair in kafka_config for part in ("--kafka-config", pair)]
        self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self) -> None:
        """Start the measured part."""
        if self._process.stdin is not None:
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def is_running(self) -> bool:
        """Tell whether messages are still to come."""
        return self._process.poll() is None

    def result(self) -> Sent:
        """Return what was sent.

        Raises:
            RuntimeError: The process failed; its own message is on stderr.
        """
        out, _ = self._process.communicate(timeout=_LOAD_EXIT_S)
        if self._process.returncode != 0:
            message = f"load process: expected exit 0, got {self._process.returncode}"
            raise RuntimeError(message)
        return Sent(**json.loads(out.splitlines()[-1]))

    def stop(self) -> None:
        """End the process if it still runs."""
        if self.is_running():
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_LOAD_EXIT_S)


def run_trial(
    load: LoadProcess,
    watch: Watch,
    offer: Offer,
    *,
    patience_s: float = 60.0,
    progress: Callable[[Answers], object] = lambda answers: None,
) -> Outcome:
    """Drive one run to its end.

    Args:
        load: Started, in its warm-up.
        watch: On the answer topics, from their present end.
        offer: What ``load`` was given.
        patience_s: Without any new answer, the run ends incomplete.
        progress: Called a few times a second.

    Raises:
        RuntimeError: The warm-up was not answered within ``patience_s``.
    """
    if not _answered(watch, offer.warm_up, patience_s, progress):
        message = (
            f"expected {offer.warm_up} warm-up transactions to be answered within "
            f"{patience_s:.0f} s, got {_count(watch.answers)}"
        )
        raise RuntimeError(message)
    begin_ms = time.time_ns() // 1_000_000
    load.begin()
    while load.is_running():
        watch.read(_LOOK_S)
        progress(watch.answers)
    sent = load.result()
    inputs = offer.warm_up + sent.transactions
    _answered(watch, inputs, patience_s, progress)
    seconds = (watch.answers.last_ms - begin_ms) / 1000
    return Outcome(sent, watch.answers, inputs, begin_ms, seconds)


def _count(answers: Answers) -> int:
    return answers.num_decisions + answers.num_dead_letters


def _answered(
    watch: Watch, wanted: int, patience_s: float, progress: Callable[[Answers], object]
) -> bool:
    last_s = time.perf_counter()
    while _count(watch.answers) < wanted and time.perf_counter() < last_s + patience_s:
        if watch.read(_LOOK_S):
            last_s = time.perf_counter()
        progress(watch.answers)
    return _count(watch.answers) >= wanted
