"""``trimoe imaging verify``: checks the evidence of a batch, and runs a sample of it again.

The sample is a batch of its own, in a directory of its own: so a case that ends its worker
is as harmless here as it was there.
"""

import argparse
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from apps.arguments import write_json
from apps.imaging.batch.driver import Hire, run_batch
from apps.imaging.batch.evidence import Verification, public_key, verify
from apps.imaging.batch.journal import read_heading
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.manifest import summary_of
from apps.imaging.batch.plan import Batch
from apps.imaging.batch.process import Application
from apps.imaging.batch.progress import Show, progress_on
from apps.imaging.launch import hire_of, stop_on_signal
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Inventory
from cluster.errors import ConfigurationError


def verify_command(
    args: argparse.Namespace, application: Application, hire: Hire | None = None
) -> int:
    """Run ``trimoe imaging verify``; return 1 if something is wrong.

    Args:
        args: Of ``commands``.
        application: What the batch is about.
        hire: Runs the workers; None takes supervised ones on a platform.

    Raises:
        FileNotFoundError, ConfigurationError: There is no evidence, or no input for a sample.
    """
    layout = Layout(args.directory.resolve(strict=True))
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-verify-")))
        hire_workers, stopping = stack.enter_context(stop_on_signal(hire or hire_of(args)))
        show = stack.enter_context(progress_on(sys.stderr))
        found = verify(
            layout,
            num_sample=args.sample,
            seed=args.seed,
            rerun=BatchRerun(application, layout, args.input, hire_workers, stopping, show),
            work=work.resolve(),
            trusted=args.public_key and public_key(args.public_key),
        )
    sys.stdout.write(as_text(found))
    write_json(args.json, {"passed": found.has_passed, **asdict(found)})
    return 0 if found.has_passed else 1


@dataclass(frozen=True, slots=True)
class BatchRerun:
    """Runs some cases of a batch again; an ``evidence.Rerun``.

    Args:
        application: What the batch is about.
        layout: Of the batch.
        given: Where its input lies; None asks its journal.
        hire: Runs the workers.
        stopping: Set to end early.
        show: Takes a tally a few times a second.
    """

    application: Application
    layout: Layout
    given: Path | None
    hire: Hire
    stopping: threading.Event
    show: Show

    def __call__(self, case_ids: Sequence[str], out: Path, /) -> Mapping[str, CaseSummary]:
        """Run them.

        Raises:
            ConfigurationError: Nobody knows where the input lies.
            FileNotFoundError: It is not there.
        """
        root, wanted = self._root(), set(case_ids)
        found = self.application.discover(root).sources
        batch = Batch(
            application=replace(self.application, report=_no_report),
            root=root,
            inventory=Inventory(tuple(each for each in found if each.case_id in wanted), ()),
            out=out,
        )
        key = Ed25519PrivateKey.generate()  # nobody keeps what it signs
        outcome = run_batch(batch, self.hire, key, stopping=self.stopping, show=self.show)
        if outcome.manifest is None:
            raise KeyboardInterrupt
        return {each["case_id"]: summary_of(each) for each in outcome.manifest["cases"]}

    def _root(self) -> Path:
        if self.given is not None:
            return self.given.resolve(strict=True)
        heading = read_heading(self.layout.journal)
        if heading is None:
            message = "input: expected its place in the journal of the batch, got none; say --input"
            raise ConfigurationError(message)
        return Path(heading.input).resolve(strict=True)


def _no_report(_summaries: Sequence[CaseSummary], _out: Path, _busy_s: float) -> Mapping[str, str]:
    return {}


def as_text(found: Verification) -> str:
    """Return a verification as lines for people: one for each case, the verdict last."""
    lines = [
        f"{each.case_id}  {'; '.join(each.problems) or 'as it was signed'}"
        f"{' and the same again' if each.is_rerun and not each.problems else ''}"
        for each in found.verdicts
    ]
    num = sum(each.is_rerun for each in found.verdicts)
    verdict = "passed" if found.has_passed else "FAILED"
    signed = f"signed by {found.signer}" if found.signer else "no valid signature"
    last = f"{verdict}: {len(found.verdicts)} cases, {num} of them run again; {signed}"
    return "\n".join([*lines, *found.problems, last]) + "\n"
