"""The phases of a run, what each needs of the machine, where files lie, and shared brokers.

A test belongs to the phase of its last marker in ``PHASES``; phases run one after the
other and their times are printed at the end.  A phase whose need is not met is skipped
and says so in one line, unless TRIMOE_REQUIRE names it: then the run fails.
``--phases unit,slow`` runs these alone; ``make test`` runs them beside the others.
"""

import gc
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from apps.fraud.brokers import EmbeddedBroker
from benchmarks.real_kafka import RealKafka, missing_tools

PHASES = ("unit", "slow", "clock", "ray", "kafka", "browser", "data", "gpu")

# Examples take as long as they do: the tests share the processor.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # clusters of tests; read when Ray is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # tests wait for it; else 10 s

# ``tmp_path`` lies in memory where there is room: no test cuts the power, yet on a disk the tests
# of boxes, fleet and console passed half of their time in ``fsync`` (4 ms each, 2026-11-28).
MEMORY, MEMORY_BYTES = Path("/dev/shm"), 2 * 2**30  # the tests of imaging leave 0.34 GiB there
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def phase_of(item: pytest.Item) -> str:
    """Return the phase a test belongs to."""
    marked = [phase for phase in PHASES if item.get_closest_marker(phase)]
    return marked[-1] if marked else "unit"


def unmet_need(phase: str) -> str:
    """Return what this machine lacks for a phase, empty if nothing."""
    if phase == "kafka":
        return ", ".join(f"no {tool}" for tool in missing_tools())
    if phase == "browser" and shutil.which("chromium") is None:
        return "no chromium"
    if phase == "data" and not os.environ.get("TRIMOE_DATA"):
        return "TRIMOE_DATA is not set"
    if phase == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "no CUDA device"
    return ""


class PhaseReport:
    """Orders tests by phase, skips what cannot run here, and reports each phase in one line.

    Args:
        chosen: Phases to run.
        required: Phases of which every test is to run, as far as they are chosen.
        is_whole: Whether the run is of all tests.
    """

    def __init__(self, chosen: list[str], required: list[str], *, is_whole: bool) -> None:
        self.chosen = chosen
        self.required = [phase for phase in required if phase in chosen]
        self.is_whole = is_whole
        self.phases: dict[str, str] = {}
        self.unmet: dict[str, str] = {}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.outcomes: Counter[tuple[str, str]] = Counter()

    @pytest.hookimpl(trylast=True)  # after -m has chosen
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        others = [item for item in items if phase_of(item) not in self.chosen]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if phase_of(item) in self.chosen]
        self.phases = {item.nodeid: phase_of(item) for item in items}
        self.unmet = {phase: unmet_need(phase) for phase in set(self.phases.values())}
        for item in items:
            if reason := self.unmet[self.phases[item.nodeid]]:
                item.add_marker(pytest.mark.skip(reason=reason))
        items.sort(key=lambda item: PHASES.index(self.phases[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        phase = self.phases[report.nodeid]
        self.seconds[phase] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[phase, report.outcome] += 1

    def broken_promises(self) -> list[str]:
        """Return the required phases of which a test was skipped, or of a whole run none passed."""
        return [
            phase
            for phase in self.required
            if self.outcomes[phase, "skipped"]
            or (self.is_whole and not self.outcomes[phase, "passed"])
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and self.broken_promises():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("phases")
        for phase in (p for p in PHASES if p in self.unmet):
            counts = ", ".join(
                f"{count} {outcome}"
                for (of, outcome), count in self.outcomes.items()
                if of == phase
            )
            reason = f" ({self.unmet[phase]})" if self.unmet[phase] else ""
            terminalreporter.line(f"{phase:8}{self.seconds[phase]:7.1f} s  {counts}{reason}")
        for phase in self.broken_promises():
            terminalreporter.line(
                f"ERROR: TRIMOE_REQUIRE names {phase}, whose tests did not all run"
            )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what is imported, Ray where it is needed, out of later collections; make those rarer.

    Rarer alone, they take 2.7 of 23 s instead of 5.1 of 26 in ``tests/cluster`` (2026-11-28).
    """
    if any("ray_imported" in getattr(item, "fixturenames", ()) for item in session.items):
        import_ray()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def phase_names(text: str) -> list[str]:
    """Return the phases of a list with commas; raise UsageError if one is unknown."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(PHASES):
        message = f"expected phases among {', '.join(PHASES)}, got {', '.join(sorted(unknown))}"
        raise pytest.UsageError(message)
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--phases", default=",".join(PHASES), help="phases to run, with commas")


def pytest_configure(config: pytest.Config) -> None:
    chosen = phase_names(config.getoption("--phases"))
    required = phase_names(os.environ.get("TRIMOE_REQUIRE", ""))
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    report = PhaseReport(chosen, required, is_whole=is_whole)
    config.pluginmanager.register(report, "trimoe-phases")


@pytest.fixture(scope="session")
def real_kafka() -> Iterator[RealKafka]:
    """One Apache Kafka for the run, topics to be created by the test; mark the test ``kafka``.

    It takes messages of 12 MB.
    """
    with RealKafka(message_max_bytes="12000000") as broker:
        yield broker


@pytest.fixture
def embedded_broker() -> Iterator[EmbeddedBroker]:
    """A fresh embedded broker, ready in 0.1 s; clients take ``EMBEDDED_CLIENT_OPTIONS``."""
    with EmbeddedBroker() as broker:
        yield broker


def import_ray() -> None:
    """Import Ray Serve with its own warnings silenced; start nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.dashboard.modules.serve.sdk
        import ray.scripts.scripts
        import ray.serve.schema  # noqa: F401


@pytest.fixture(scope="session")
def ray_imported() -> None:
    """Ray Serve, imported once."""
    import_ray()
