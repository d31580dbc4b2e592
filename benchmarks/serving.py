"""``trimoe bench serving``: what the scheduler, the engine and the versions are worth.

Cases, each against the same model in the same run:
    mixed      a stream beside batch requests always in flight: FIFO, ``@serve.batch`` by tokens,
               two deployments that share the machine, ours
    goodput    answers within a deadline over a sweep of offered load, against padded batches
    lengths    tokens/s of log-uniform lengths, against padded batches
    long       a stream while one sequence of 65,536 tokens is in flight
    overload   three times the capacity, then half of it
    versions   hot swap, canary and shadow under load
    joint      hot swaps, canary, promotion and rollback of a joint checkpoint while all of its
               applications ask; the exit status is 1 if any request failed
    sweep      GPU: useful tokens/s while the stream grows from 100 to 2,000 sequences/s

Weights are random but for those of the versions: no figure here speaks of quality.
"""

import argparse
import json
import math
import os
import sys
import time
from importlib import import_module
from typing import Any

from benchmarks.results import RESULTS, append_row

CASES = {
    "mixed": "benchmarks.serving_mixed",
    "goodput": "benchmarks.serving_ragged",
    "lengths": "benchmarks.serving_ragged",
    "long": "benchmarks.serving_ragged",
    "overload": "benchmarks.serving_overload",
    "versions": "benchmarks.serving_versions",
    "joint": "benchmarks.serving_joint",
    "sweep": "benchmarks.serving_sweep",
}


def finite(figures: Any) -> Any:  # noqa: ANN401 - nested figures
    """Return figures with None for what JSON cannot say: the p99 of answers that never came."""
    if isinstance(figures, dict):
        return {name: finite(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def main(args: argparse.Namespace) -> int:
    """Run the chosen cases; the last line is one JSON object, the status 1 if ``joint`` had errors.

    Raises:
        ConfigurationError: Case ``joint`` has no checkpoint.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    from cluster import platform  # noqa: PLC0415 - sets what Ray reads at import

    platform.prepare_environment()
    import ray  # noqa: PLC0415 - after the environment

    from benchmarks.serving_joint_changes import find_joint  # noqa: PLC0415 - as above
    from benchmarks.serving_rig import Rig  # noqa: PLC0415 - as above

    cases = args.case or [case for case in CASES if case != "sweep"]
    more = {"joint": {"checkpoint": find_joint(args.checkpoint)}} if "joint" in cases else {}
    platform.start_ray(platform.PlatformConfig(port=None, device=args.device, num_cpus=8))
    figures: dict[str, Any] = {}
    try:
        rig = Rig(args.preset, args.device, args.seconds, args.rounds)
        for case in cases:
            began = time.monotonic()
            rig.say(f"case {case} ...")
            run = getattr(import_module(CASES[case]), f"run_{case}")
            figures[case] = finite(run(rig, **more.get(case, {})))
            figures[case]["case_seconds"] = round(time.monotonic() - began, 1)
            rig.say(json.dumps({case: figures[case]}))
    finally:
        from ray import serve  # noqa: PLC0415 - as above

        serve.shutdown()
        ray.shutdown()
    setting = {"device": args.device, "preset": args.preset, "cores": len(os.sched_getaffinity(0))}
    for case, values in figures.items():
        row = {"case": case, **setting, "figures": json.dumps(values)}
        append_row(args.results or RESULTS, "serving", row)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if figures.get("joint", {}).get("errors") else 0
