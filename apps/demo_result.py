"""What came of ``trimoe demo --all``: whether all was answered, the figures, the summary."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from apps.demo_processes import Process, as_lines
from apps.demo_view import Steps
from apps.fraud.trial import Outcome
from apps.fraud.watch import Answers
from apps.imaging.batch.driver import Outcome as BatchOutcome


class Company(NamedTuple):
    """What ran beside the stream.

    Args:
        batch: Of the CT cases.
        ended_ms: When the last case was done, milliseconds since 1970.
        forecast_ms: Time of each forecast that came back.
        wanted_forecasts: How many were asked for.
    """

    batch: BatchOutcome
    ended_ms: float
    forecast_ms: Sequence[float]
    wanted_forecasts: int


@dataclass(frozen=True)
class Result:
    """Everything that is reported.

    Args:
        alone: The stream by itself.
        beside: The stream in company.
        company: The others.
        steps: Of the second stretch.
        processes: While all of it was up.
        seconds: Of the whole demo.
    """

    alone: Outcome
    beside: Outcome
    company: Company
    steps: Steps
    processes: Sequence[Process]
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every transaction was answered once, every case done, every forecast back."""
        batch = self.company.batch
        return (
            all(each.num_answers == each.inputs for each in (self.alone, self.beside))
            and batch.is_done
            and batch.tally.num_quarantined == 0
            and len(self.company.forecast_ms) == self.company.wanted_forecasts
        )

    def figures(self) -> dict[str, object]:
        """Return what ``--json`` writes: the keys of ``trimoe demo``, and more."""
        stretches = (self.alone, self.beside)
        p50, p99 = _joined(stretches).quantiles_ms()
        alone_p50, alone_p99 = self.alone.answers.quantiles_ms(after_ms=self.alone.begin_ms)
        beside_p50, beside_p99 = self.beside.answers.quantiles_ms(
            after_ms=self.beside.begin_ms, before_ms=self.company.ended_ms
        )
        tally, took_ms = self.company.batch.tally, sorted(self.company.forecast_ms)
        return {
            "inputs": sum(each.inputs for each in stretches),
            "decisions": sum(each.answers.num_decisions for each in stretches),
            "dead_letters": sum(each.answers.num_dead_letters for each in stretches),
            "tx_per_s": sum(each.sent.transactions for each in stretches)
            / sum(each.seconds for each in stretches),
            "p50_ms": p50,
            "p99_ms": p99,
            "seconds": self.seconds,
            "p50_alone_ms": alone_p50,
            "p99_alone_ms": alone_p99,
            "p50_beside_ms": beside_p50,
            "p99_beside_ms": beside_p99,
            "p99_ratio": beside_p99 / alone_p99,
            "cases": tally.num_cases,
            "cases_done": tally.num_settled - tally.num_quarantined,
            "cases_quarantined": tally.num_quarantined,
            "batch_seconds": self.company.batch.seconds,
            "forecasts": self.company.wanted_forecasts,
            "forecasts_answered": len(took_ms),
            "forecast_p50_ms": took_ms[len(took_ms) // 2] if took_ms else None,
            "tokens": dict(self.steps.by_task()),
            "steps": self.steps.num_steps,
            "mixed_share": self.steps.mixed_share,
            "processes_with_model": sum(each.has_model for each in self.processes),
            "processes_with_torch": sum(each.has_torch for each in self.processes),
            "processes": [each._asdict() for each in self.processes],
        }


def _joined(stretches: Sequence[Outcome]) -> Answers:
    """Return the latencies of all measured parts."""
    joined = Answers()
    for each in stretches:
        for sent_ms, took_ms in zip(
            each.answers.timestamp_ms, each.answers.latency_ms, strict=True
        ):
            if sent_ms >= each.begin_ms:
                joined.timestamp_ms.append(sent_ms)
                joined.latency_ms.append(took_ms)
    return joined


def summary(figures: Mapping[str, Any], result: Result) -> Iterator[str]:
    """Yield what is said in the end."""
    tokens = "  ".join(f"{task} {num}" for task, num in figures["tokens"].items())
    yield ""
    yield (
        f"transactions  {figures['inputs']} in, {figures['decisions']} decisions and "
        f"{figures['dead_letters']} dead letters out"
    )
    yield (
        f"p99           {figures['p99_alone_ms']:.0f} ms alone, {figures['p99_beside_ms']:.0f} ms "
        f"beside the others: {figures['p99_ratio']:.2f} times"
    )
    yield (
        f"CT cases      {figures['cases_done']} of {figures['cases']} done, "
        f"{figures['cases_quarantined']} quarantined, {figures['batch_seconds']:.0f} s"
    )
    yield f"forecasts     {figures['forecasts_answered']} of {figures['forecasts']} answered"
    yield f"tokens        {tokens}"
    yield f"steps         {figures['steps']}, {figures['mixed_share']:.0%} of them mixed tasks"
    yield f"model         in {figures['processes_with_model']} of {len(result.processes)} processes"
    yield from as_lines(result.processes)
    yield f"seconds       {figures['seconds']:.1f}"
    if not result.is_complete:
        yield "INCOMPLETE    something was not answered once; see above"
