"""What a replica measures about its own work: turns events of the engine into metrics."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import DeadlineExceededError, TrimoeError
from cluster.recorder import Recorder
from cluster.schemas import InferRequest, InferResponse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cluster.scheduler import Job, Scheduler, Step

GAUGE_PERIOD_S = 1.0  # gauges and expert loads are summed up here and passed on this often


class Telemetry:
    """Records the metrics of one replica.

    Args:
        recorder: Where they go.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._next_s = 0.0
        self._load: dict[str, NDArray[np.int64]] = {}
        self._unsent: defaultdict[str, NDArray[np.int64] | int] = defaultdict(int)
        self._step_tokens: Counter[tuple[str, str]] = Counter()
        self._num_steps = 0
        self._num_mixed = 0

    def composition(self) -> Mapping[str, Any]:
        """Return what steps were made of since the start; plain values only.

        Two of these, some time apart, say it of the steps between them.
        """
        tokens: dict[str, dict[str, int]] = {}
        for (task, each), num in sorted(self._step_tokens.items()):
            tokens.setdefault(task, {})[each] = num
        return {"steps": self._num_steps, "mixed_steps": self._num_mixed, "step_tokens": tokens}

    def step(self, step: "Step", elapsed_ms: float, scheduler: "Scheduler") -> None:
        """A step has ended."""
        self._num_steps += 1
        self._num_mixed += len({part.job.request.task for part in step}) > 1
        for part in step:
            request = part.job.request
            self._step_tokens[request.task, str(request.service_class)] += part.num_tokens
        record = self._recorder.record
        record("trimoe_step_ms", elapsed_ms, {})
        record("trimoe_step_tokens", sum(part.num_tokens for part in step), {})
        record("trimoe_padding_tokens", 0, {})
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + GAUGE_PERIOD_S
            for each, tokens in scheduler.queued_tokens.items():
                record("trimoe_queued_tokens", tokens, {"service_class": each})
            record("trimoe_predicted_delay_ms", scheduler.predicted_delay_ms, {})
            self._send_loads()

    def answered(self, job: "Job", response: InferResponse, total_ms: float) -> None:
        """A request was answered."""
        request, version = job.request, response.model_version
        labels = {"task": request.task, "service_class": request.service_class, "version": version}
        record = self._recorder.record
        record("trimoe_requests_total", 1, {**labels, "outcome": "ok"})
        record("trimoe_tokens_total", int(job.work.tokens.sum()), labels)
        by_class = {"service_class": request.service_class}
        record("trimoe_queue_ms", response.timings.queued_ms, by_class)
        if total_ms > request.deadline_ms:
            record("trimoe_deadline_misses_total", 1, by_class)
        load = response.tokens_per_expert
        self._load[version] = self._load.get(version, 0) + load
        self._unsent[version] += load

    def refused(self, request: InferRequest, version: str, error: TrimoeError) -> None:
        """A request got an error."""
        labels = {
            "task": request.task,
            "service_class": request.service_class,
            "version": version,
            "outcome": type(error).__name__,
        }
        self._recorder.record("trimoe_requests_total", 1, labels)
        if isinstance(error, DeadlineExceededError):
            by_class = {"service_class": request.service_class}
            self._recorder.record("trimoe_deadline_misses_total", 1, by_class)

    def shadowed(self, version: str, num_sequences: int, num_disagreed: int) -> None:
        """A shadow has answered."""
        labels = {"version": version}
        self._recorder.record("trimoe_shadow_sequences_total", num_sequences, labels)
        if num_disagreed:  # Ray's counters take no zero
            self._recorder.record("trimoe_shadow_disagreement_total", num_disagreed, labels)

    def _send_loads(self) -> None:
        for version, unsent in self._unsent.items():
            for (layer, expert), tokens in np.ndenumerate(unsent):
                labels = {"layer": str(layer), "expert": str(expert), "version": version}
                if tokens:
                    self._recorder.record("trimoe_expert_tokens_total", int(tokens), labels)
            load = self._load[version]
            for layer, ratio in enumerate(load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)):
                labels = {"layer": str(layer), "version": version}
                self._recorder.record("trimoe_expert_imbalance_ratio", float(ratio), labels)
        self._unsent.clear()
