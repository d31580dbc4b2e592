"""Kernels on and off end to end: the order, what is said of it, and the parts without Ray."""

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.imaging_cases import whole_body
from benchmarks.imaging_rig import SHIPPED
from benchmarks.kernel_end_to_end import (
    METRICS,
    ROUNDS,
    Row,
    Way,
    measure_rounds,
    medians_of,
    run_apart,
    table,
    ways_of,
)
from benchmarks.kernel_platform import (
    HOURS_IN_FLIGHT,
    SMALL,
    case_figures,
    forecast_figures,
    rate_of,
)
from cluster.errors import ConfigurationError
from cluster.local import LocalClient


class Watch:
    """A clock that what runs moves."""

    def __init__(self, took_s: Iterator[float]) -> None:
        self.now_s, self._took_s = 0.0, took_s

    def run(self, way: Way) -> Row:
        self.now_s += next(self._took_s)
        return {"fraud_p99_ms": 1.0}

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("ends_s", "wanted"),
    [
        (240.0, ["on 1", "off 1", "off 2", "on 2"]),  # 90 + 3 x 50
        (239.0, ["on 1", "off 1"]),
        (0.0, ["on 1", "off 1"]),
    ],
)
def test_a_second_round_is_the_other_way_round_and_begins_if_it_fits(
    ends_s: float, wanted: list[str]
) -> None:
    watch = Watch(iter([90.0, 50.0, 50.0, 50.0]))  # the first one compiles
    rows = measure_rounds(watch.run, ROUNDS, ends_s, watch.clock)
    assert [f"{way} {number}" for way, number, _ in rows] == wanted


def rows_of(way: Way, *values: float) -> list[Row]:
    return [{"way": way, **dict.fromkeys(METRICS, value)} for value in values]


def test_gains_are_above_one_where_the_kernels_are_better() -> None:
    medians = medians_of([*rows_of("on", 10.0, 30.0), *rows_of("off", 50.0, 30.0)])
    assert medians["ct_s"] == {"on": 20.0, "off": 40.0, "gain": 2.0}
    assert medians["forecasts_s"] == {"on": 20.0, "off": 40.0, "gain": 0.5}
    head, *lines = table(medians)
    assert head.split() == ["kernels", "on", "off", "gain"]
    assert "forecasts a second                          20.0      40.0       0.5" in lines


def test_a_cpu_is_measured_once_and_its_table_has_one_column(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ways_of("cpu") == (("on",),)
    assert "one form" in capsys.readouterr().out
    head, *lines = table(medians_of(rows_of("on", 3.0)))
    assert head.split() == ["kernels", "on"]
    assert len(lines) == len(METRICS)


def test_a_platform_without_figures_is_one_error(tmp_path: Path) -> None:
    args = argparse.Namespace(device="cpu", rate=1.0, small=True)
    with pytest.raises(ConfigurationError, match="kernels off: expected figures, got nothing"):
        run_apart(args, "off", tmp_path, 0.01)


def test_a_rate_counts_what_calls_did_and_keeps_some_in_flight() -> None:
    asked, running, most = [], 0, 0

    async def run(number: int) -> int:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.01)
        running -= 1
        asked.append(number)
        return 10

    rate = asyncio.run(rate_of(run, [7, 8], 0.05))
    assert most == HOURS_IN_FLIGHT
    assert set(asked) == {7, 8}
    assert 10 * len(asked) / 0.5 < rate <= 10 * len(asked) / 0.05


@pytest.mark.slow
def test_shipped_weights_give_every_figure_of_cases_and_forecasts(tmp_path: Path) -> None:
    case = whole_body(tmp_path, SMALL.shape)
    with LocalClient.from_checkpoint(SHIPPED / "shared") as client:
        figures = case_figures(client, case, tmp_path / "out", 1)
        figures |= asyncio.run(forecast_figures(client, num_machines=3, seconds=0.1))
    assert 0.0 < figures["ct_infer_s"] < figures["ct_s"]
    assert figures["forecasts_s"] > 0
    assert figures["forecasts_prepared_s"] > 0
    assert set(figures) < set(METRICS)
    assert list((tmp_path / "out").glob("*.html"))
