"""Time of a call, eager and inside a captured CUDA graph, and the launches it makes.

A run calls once with each of several sets of inputs, so that the weights of one call are not
what the last one left in cache.  A sample is the time of some runs between two CUDA events,
over the calls in it; samples of rivals alternate.  Eager samples hold what the host takes to
launch; inside a graph the kernels follow each other.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
SAMPLE_S, SERIES_S = 5e-3, 0.25  # of one sample at least; of all samples about
MAX_SAMPLES, MIN_SAMPLES = 30, 3
CPU_SAMPLES = 5  # where the figures only prove that the harness works
WARM_UPS, WARM_UP_S = 3, 0.1  # runs, fewer if they take longer; the last of them is timed


class NotCapturedError(Exception):
    """A call that no CUDA graph can hold; the message says why."""


class Timing(NamedTuple):
    """Time of a call.

    Args:
        us: Median of the samples.
        spread: Their middle 60 % over the median.
    """

    us: float
    spread: float


def is_gpu(device: str) -> bool:
    """Tell whether the device has streams, graphs and events."""
    return device == "cuda"


@dataclass(slots=True)
class Series:
    """Samples of the time of a call.

    Args:
        run: Makes some calls.
        num_calls: How many.
        device: Where.
        warm_us: Time of a call at the end of the warm-up.
    """

    run: Run
    num_calls: int
    device: str
    repeats: int = 1
    num_samples: int = CPU_SAMPLES
    warm_us: float = 0.0
    samples_us: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run a few times, and choose repeats and the number of samples by what that took."""
        if not is_gpu(self.device):
            self.run()
            return
        began_s = time.monotonic()
        for _ in range(WARM_UPS):
            self.warm_us = self._sample_us()
            if time.monotonic() - began_s > WARM_UP_S:
                break
        seconds = max(self.warm_us * self.num_calls / 1e6, 1e-7)
        self.repeats = max(1, math.ceil(SAMPLE_S / seconds))
        affordable = int(SERIES_S / (seconds * self.repeats))
        self.num_samples = min(MAX_SAMPLES, max(MIN_SAMPLES, affordable))

    def sample(self) -> None:
        """Take a sample, unless there are enough."""
        if len(self.samples_us) < self.num_samples:
            self.samples_us.append(self._sample_us())

    def measure(self) -> Timing:
        """Take all samples, with no rival in between."""
        self.warm_up()
        for _ in range(self.num_samples):
            self.sample()
        return self.timing()

    def timing(self) -> Timing:
        """Return the figures of the samples."""
        middle = median(self.samples_us)
        fifths = quantiles(self.samples_us, n=5, method="inclusive")
        return Timing(middle, (fifths[-1] - fifths[0]) / middle)

    def _sample_us(self) -> float:
        calls = self.repeats * self.num_calls
        if not is_gpu(self.device):
            began_s = time.perf_counter()
            self._repeat()
            return (time.perf_counter() - began_s) * 1e6 / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._repeat()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / calls

    def _repeat(self) -> None:
        for _ in range(self.repeats):
            self.run()


def alternate(series: Sequence[Series], ends_s: float = math.inf) -> None:
    """Take all samples of all series, one of each in turn; the least number past the time."""
    for count in range(max((each.num_samples for each in series), default=0)):
        if count >= MIN_SAMPLES and time.monotonic() > ends_s:
            break
        for each in series:
            each.sample()


def in_turn(calls: Sequence[Run]) -> Run:
    """Return a run of all calls, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def capture(calls: Sequence[Run]) -> torch.cuda.CUDAGraph:
    """Return a graph of all calls, which have run before.

    A call that waits for the device is found out before the capture, which it would break for
    all that follow in this process.

    Raises:
        NotCapturedError: They wait for the device or allocate, or the capture failed.
    """
    try:
        _demand_no_wait(calls[0])
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        message = "waits for the device"
        raise NotCapturedError(message) from error
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            in_turn(calls)()
    except Exception as error:
        torch.cuda.set_stream(stream)  # a failed capture leaves its own
        raise NotCapturedError(first_line(error)) from error
    return graph


def _demand_no_wait(call: Run) -> None:
    """Call, with an error where torch waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "does not yet detect all"
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def count_launches(call: Run) -> int | None:
    """Return the kernels, copies and fills of a call; None where the profiler sees none."""
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
    except RuntimeError:  # a machine that lets nobody profile
        return None
    launched = sum(event.device_type == DeviceType.CUDA for event in profiled.events() or ())
    return launched or None


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error, at most 120 letters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]
