"""``trimoe sync retrain``: train a group's model anew when a trigger asks for it.

    look at the triggers -> Ray job -> sign -> shadow -> staged rollout -> an operator approves

It runs where the plant's record and the signing keys are, not on the server of the fleet.  Each
step is found done or is done: killed at any moment, the next call goes on, and what was published
is not published again.  Without keys the bundle waits until somebody has signed it elsewhere.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from apps.maintenance.edge.bundle import GOLDEN, INFO, MODEL, BundleInfo, pack, unpack
from apps.maintenance.edge.durable import write_whole
from apps.maintenance.edge.lock import AgentRunsError, sole_agent
from apps.maintenance.fleet import Fleet
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.evidence import alerts_of, readings
from apps.maintenance.sync.keys import load_keys
from apps.maintenance.sync.offers import Offer, offers_of
from apps.maintenance.sync.policy import Plan, Status
from apps.maintenance.sync.publishing import publish_bundle
from apps.maintenance.sync.repository import Repository
from apps.maintenance.sync.retrainings import OPEN, Retraining, State
from apps.maintenance.sync.shadow import History
from apps.maintenance.sync.triggers import Reading, Trigger
from apps.maintenance.tables import read_fleet
from apps.maintenance.training.retrain_job import (
    BUNDLE,
    CHECKPOINT,
    HISTORY,
    Order,
    Say,
    run_order,
)
from apps.maintenance.training.retrain_record import find_drift
from cluster.errors import ConfigurationError, TrimoeError, UnavailableError
from cluster.platform import PlatformConfig, prepare_environment, start_ray

LOOK_S = 30.0  # between two looks at the triggers while a job runs
MAX_RETRIES = 2  # of a job whose process dies; its parts stay
MAX_DETAIL = 300  # characters of an error
OBJECT_STORE_BYTES = 100 * 2**20  # a job takes and returns paths
LOG = "log.txt"
Work = Callable[[Order, Say], Path]


@dataclass(frozen=True, slots=True)
class LogFile:
    """Progress of a job, a line each; may be sent to another process.

    Args:
        path: The file.
    """

    path: Path

    def __call__(self, text: str) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")


@dataclass(frozen=True, slots=True)
class Retrainer:
    """Keeps the model of one group fit.

    Args:
        control: Of the fleet.
        group: Fleet group.
        record: Folder of the plant's tables.
        checkpoint: Of the first deployed model; those of later ones are known here.
        keys: Folders of signing keys; without any the bundle waits for somebody who has them.
        plan: Of rollouts.
        threads: Of a job.
        work: What a job computes.
    """

    control: Control
    group: str
    record: Path
    checkpoint: Path
    keys: Sequence[Path] = ()
    plan: Plan = field(default_factory=Plan)
    threads: int = 1
    work: Work = run_order

    def attend(self) -> Retraining | None:
        """Look at the triggers, and do what is due; return the retraining, if one was.

        Raises:
            ConfigurationError: The group has no stable bundle.
            FileNotFoundError: There is no record.
        """
        info = self._deployed()
        record = read_fleet(self.record)
        folder = self.control.retraining
        folder.mkdir(parents=True, exist_ok=True)
        retrainings = self.control.retrainings
        try:
            with sole_agent(folder):
                early = tuple(Trigger) if find_drift(record, info).is_unlabelled else ()
                found = retrainings.look(self.group, self._readings(info, record), early)
                return None if found is None else self._complete(found, info, record)
        except AgentRunsError:
            retrainings.fold(self.group, self._readings(info, record))
            return None

    def _complete(self, found: Retraining, info: BundleInfo, record: Fleet) -> Retraining:
        """Do what is left of a retraining; whatever fails is its end, and has a name."""
        note = self.control.retrainings.note
        try:
            folder = self.control.retraining / str(found.number)
            if not (folder / BUNDLE).exists():
                note(found.number, State.RUNNING, "a job computes it")
                self._compute(folder, info, record)
            return self._roll_out(found, folder)
        except (TrimoeError, OSError, ValueError) as error:
            return note(found.number, State.FAILED, " ".join(str(error).split())[:MAX_DETAIL])

    def _compute(self, folder: Path, info: BundleInfo, record: Fleet) -> None:
        """Run the job on Ray, and go on looking at the triggers meanwhile.

        Raises:
            UnavailableError: The job failed, or its processes died again and again.
        """
        prepare_environment()
        import ray  # noqa: PLC0415 - reads the environment when imported
        from ray.exceptions import RayError  # noqa: PLC0415 - likewise

        order = Order(
            folder=folder.resolve(),
            record=self.record.resolve(),
            deployed=self._deployed_checkpoint().resolve(),
            info=info,
            version=self._next_version(),
            threads=self.threads,
        )
        config = PlatformConfig(
            port=None, num_cpus=self.threads, object_store_bytes=OBJECT_STORE_BYTES
        )
        try:
            start_ray(config)
            job = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(self.work)
            running = job.remote(order, LogFile(order.folder / LOG))
            while not ray.wait([running], timeout=LOOK_S)[0]:
                self.control.retrainings.fold(self.group, self._readings(info, record))
            ray.get(running)
        except (RayError, RuntimeError) as error:  # the latter where Ray does not start
            cause = getattr(error, "cause", None) or error
            message = f"job: {type(cause).__name__}: {cause}"
            raise UnavailableError(message) from error
        finally:
            ray.shutdown()

    def _roll_out(self, found: Retraining, folder: Path) -> Retraining:
        """Sign the bundle and begin its rollout, unless that is done."""
        control, note = self.control, self.control.retrainings.note
        repository = Repository(control.repository, load_keys(self.keys) if self.keys else [])
        offer = self._offer(repository, folder / BUNDLE)
        if offer is None:
            text = f"expects a signature: trimoe sync publish --bundle {folder / BUNDLE}"
            return note(found.number, State.WAITING, text)
        rollouts = [each for each in control.rollouts.list() if each.group == self.group]
        begun = next((each for each in rollouts if each.digest == offer.digest), None)
        if begun is None:
            others = [each for each in rollouts if each.status not in {Status.DONE, Status.STOPPED}]
            if others:
                text = f"expects rollout {others[0].id} of the group to end"
                return note(found.number, State.WAITING, text, version=offer.version)
            history = History.read(folder / HISTORY)
            begun = control.begin_rollout(repository, offer, self.group, self.plan, history)
        state = State.REFUSED if begun.status is Status.STOPPED else State.ROLLED_OUT
        detail = begun.reason if state is State.REFUSED else f"rollout {begun.id}"
        return note(found.number, state, detail, version=offer.version, rollout=begun.id)

    def _offer(self, repository: Repository, bundle: Path) -> Offer | None:
        """Return the signed bundle, signed now if it was not; None without keys."""
        packed = bundle.read_bytes()
        signed = {each.digest: each for each in offers_of(repository.targets.targets)}
        if (found := signed.get(sha256(packed).hexdigest())) is not None:
            return found
        if not self.keys:
            return None
        files = unpack(packed)
        info = BundleInfo.from_json(files[INFO])
        if info.version < (version := self._next_version()):  # somebody has published since
            packed = pack(replace(info, version=version), files[GOLDEN], files[MODEL])
            write_whole(bundle, packed)
        return publish_bundle(repository, packed, [self.group])

    def _next_version(self) -> int:
        offers = offers_of(Repository(self.control.repository, []).targets.targets)
        return 1 + max(each.version for each in offers)

    def _deployed(self) -> BundleInfo:
        in_use = self.control.rollouts.stable(self.group)
        if in_use is None:
            message = f"group {self.group}: expected a bundle that was rolled out, got none"
            raise ConfigurationError(message)
        packed = Repository(self.control.repository, []).read(in_use)
        return BundleInfo.from_json(unpack(packed)[INFO])

    def _deployed_checkpoint(self) -> Path:
        """Return the checkpoint behind the stable bundle of the group."""
        in_use = self.control.rollouts.stable(self.group)
        for each in self.control.retrainings.list(self.group):
            if each.rollout and self.control.rollouts.get(each.rollout).path == in_use:
                return self.control.retraining / str(each.number) / CHECKPOINT
        return self.checkpoint

    def _readings(self, info: BundleInfo, record: Fleet) -> Mapping[Trigger, Reading]:
        known = self.control.boxes()
        boxes = [each for each in known if each.group == self.group and not each.is_offline]
        with self.control.database.transaction() as db:
            alerts = alerts_of(db, self.group, info.name)
        return readings(info, boxes, alerts, record, self.control.clock())


def main(args: argparse.Namespace) -> int:
    """Look once, or again and again; a training that fails is an event and no end."""
    with Control(args.fleet) as control:
        retrainer = Retrainer(
            control,
            args.group,
            args.record,
            args.checkpoint,
            args.keys or (),
            threads=args.threads,
        )
        while True:
            found = retrainer.attend()
            triggers = [each for each in control.retrainings.triggers() if each.group == args.group]
            facts = {
                "triggers": [asdict(each) for each in triggers],
                "retraining": asdict(found) if found else None,
            }
            sys.stdout.write(json.dumps(facts, indent=1) + "\n")
            sys.stdout.flush()
            if not args.every:
                is_good = found is None or found.state in {*OPEN, State.ROLLED_OUT}
                return 0 if is_good else 1
            time.sleep(args.every)
