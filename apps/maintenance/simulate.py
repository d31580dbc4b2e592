"""Seeded generator of a fleet: wear, shocks, precursors, error codes, visits, gaps.

A component wears with the load of its machine and fails when its wear reaches a strength
that nobody sees.  On the way its sensor drifts and its error code grows more frequent; some
failures come from a shock and give no notice.  Technicians visit each machine in a fixed
rhythm and replace what is oldest, and whatever has failed in the hour of its failure.

What it is for: weights, demonstrations and dashboards that may be passed on.  What it is not:
any real plant.

Legend: M machines, C components (as many sensors), T hours.
"""

import argparse
import sys
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from apps.maintenance.fleet import Bools, Fleet, Floats, Ints, Records
from apps.maintenance.tables import write_fleet

START = datetime(2024, 1, 1)
COMPONENTS = ("bearing", "drive", "gearbox", "pump")
SENSORS = ("vibration", "current", "speed", "pressure")  # each shows the wear of its component
ERRORS = ("E1", "E2", "E3", "E4", "E5")  # by component; the last belongs to none
NUM_MODELS = 4
USUAL = np.array([4.0, 32.0, 1480.0, 6.0])  # mm/s, A, 1/min, bar
NOISE = np.array([0.4, 2.0, 25.0, 0.25])
DRIFT = np.array([3.0, 2.5, -2.5, -3.0])  # deviations at the moment of failure
MEAN_LIFE_DAYS = np.array([70.0, 110.0, 90.0, 80.0])
RAMP_START = 0.93  # share of the life after which the sensor begins to drift


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """Size and habits of the fleet.

    Args:
        num_machines: M.
        num_days: Length of the record.
        seed: Of everything.
        service_days: Between two visits to a machine.
        shock_days: Mean days between shocks of one component that end its life at once.
        error_days: Mean days between error codes of a sound component.
        gap_days: Mean days between outages of a machine's telemetry, each up to a day long.
    """

    num_machines: int = 60
    num_days: int = 360
    seed: int = 0
    service_days: int = 14
    shock_days: float = 900.0
    error_days: float = 45.0
    gap_days: float = 40.0

    def __post_init__(self) -> None:
        for name in ("num_machines", "num_days", "service_days"):
            if getattr(self, name) < 1:
                message = f"{name}: expected 1 or more, got {getattr(self, name)}"
                raise ValueError(message)


class _World:
    """The state of all components while the hours pass."""

    def __init__(self, config: SimulationConfig, generator: np.random.Generator) -> None:
        self.config, self.generator = config, generator
        num = config.num_machines
        self.models: Ints = generator.integers(0, NUM_MODELS, num)
        self.age_years: Floats = generator.uniform(0.0, 20.0, num).round()
        pace = generator.lognormal(0.0, 0.15, (NUM_MODELS, len(COMPONENTS)))[self.models]
        older = 1.0 + 0.02 * self.age_years[:, None]
        self.rate: Floats = pace * older / (MEAN_LIFE_DAYS * 24.0)
        self.phase: Ints = generator.integers(0, config.service_days, num) * 24
        self.installed: Ints = np.zeros((num, len(COMPONENTS)), np.int64)
        self.wear: Floats = generator.uniform(0.0, 0.7, self.installed.shape)
        self.strength: Floats = np.ones_like(self.wear)
        self.records: dict[str, list[tuple[int, int, int]]] = {
            name: [] for name in ("errors", "failures", "maintenance")
        }
        self._strengthen(np.ones_like(self.wear, dtype=bool))

    @property
    def ramp(self) -> Floats:
        """How far each component is on its last stretch, 0 .. 1."""
        share = self.wear / self.strength
        return np.clip((share - RAMP_START) / (1.0 - RAMP_START), 0.0, 1.0)

    def pass_hour(self, hour: int, load: Floats) -> None:
        """Let an hour of wear pass, with its errors, failures and visits."""
        config, generator = self.config, self.generator
        self.wear += self.rate * load[:, None]
        shocked = generator.random(self.wear.shape) < 1.0 / (config.shock_days * 24.0)
        failed = (self.wear >= self.strength) | shocked
        chance = 1.0 / (config.error_days * 24.0) + 0.05 * self.ramp
        self._note("errors", hour, generator.random(self.wear.shape) < chance)
        stray = generator.random(self.wear.shape[0]) < 1.0 / (config.error_days * 24.0)
        self.records["errors"] += [(int(m), hour, len(COMPONENTS)) for m in np.flatnonzero(stray)]
        due = (hour - self.phase) % (config.service_days * 24) == 0
        planned = np.zeros_like(failed)
        oldest = self.installed.argmin(axis=1)
        planned[np.flatnonzero(due), oldest[due]] = True
        self._note("failures", hour, failed)
        self._replace(hour, failed | planned)

    def _note(self, name: str, hour: int, happened: Bools) -> None:
        machines, kinds = np.nonzero(happened)
        self.records[name] += [(int(m), hour, int(k)) for m, k in zip(machines, kinds, strict=True)]

    def _replace(self, hour: int, replaced: Bools) -> None:
        self._note("maintenance", hour, replaced)
        self.installed[replaced] = hour
        self.wear[replaced] = 0.0
        self._strengthen(replaced)

    def _strengthen(self, renewed: Bools) -> None:
        self.strength[renewed] = self.generator.weibull(3.0, int(renewed.sum())).clip(0.2, None)


def simulate(config: SimulationConfig) -> Fleet:
    """Return a generated fleet; the same configuration gives the same fleet."""
    generator = np.random.default_rng(config.seed)
    world = _World(config, generator)
    num_hours = config.num_days * 24
    shift = generator.uniform(0.0, 24.0, config.num_machines)
    telemetry = np.empty((config.num_machines, num_hours, len(SENSORS)), np.float32)
    for hour in range(num_hours):
        load = 1.0 + 0.3 * np.sin(2.0 * np.pi * (hour + shift) / 24.0)
        ramp = world.ramp
        noise = generator.normal(size=ramp.shape) + 0.5 * (load[:, None] - 1.0)
        telemetry[:, hour] = USUAL + NOISE * (noise + DRIFT * ramp)
        world.pass_hour(hour, load)
    telemetry[_gaps(config, num_hours, generator)] = np.nan
    return Fleet(
        start=START,
        num_hours=num_hours,
        machines=[f"M{number:03d}" for number in range(config.num_machines)],
        models=world.models,
        age_years=world.age_years,
        error_names=ERRORS,
        components=COMPONENTS,
        sensors=SENSORS,
        errors=_records(world.records["errors"]),
        failures=_records(world.records["failures"]),
        maintenance=_records(world.records["maintenance"]),
        telemetry=telemetry,
    )


def _gaps(config: SimulationConfig, num_hours: int, generator: np.random.Generator) -> Bools:
    """Return the hours in which a machine's telemetry is missing, [M, T]."""
    missing = np.zeros((config.num_machines, num_hours), bool)
    starts = generator.random(missing.shape) < 1.0 / (config.gap_days * 24.0)
    for machine, hour in zip(*np.nonzero(starts), strict=True):
        missing[machine, hour : hour + int(generator.integers(1, 25))] = True
    return missing


def _records(triples: list[tuple[int, int, int]]) -> Records:
    columns = np.array(triples, np.int64).reshape(-1, 3)
    return Records.sorted(columns[:, 0], columns[:, 1], columns[:, 2])


def main(args: argparse.Namespace) -> int:
    """Write a generated fleet as a folder of tables."""
    fleet = simulate(SimulationConfig(args.machines, args.days, args.seed))
    write_fleet(fleet, args.out)
    sys.stdout.write(
        f"{fleet.num_machines} machines, {args.days} days, {fleet.failures.hour.size} failures "
        f"in {args.out}\n"
    )
    return 0
