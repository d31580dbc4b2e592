"""What the platform does when parts of it are lost: one command, five cases.

    python -m benchmarks.faults replica --json F    SIGKILL of replicas, two of them, under load
    python -m benchmarks.faults node --json F       a node is lost under the fraud stream
    python -m benchmarks.faults frozen --json F     a node falls silent, its connections stay open
    python -m benchmarks.faults rolling --json F    all nodes are replaced, one after another
    python -m benchmarks.faults head --json F       the head restarts, its state kept by Redis

Everything runs on this machine, on loopback addresses; each case takes one to three minutes on
two cores.  Exit status 0 only if no call failed and, with the stream, every transaction was
decided with the features of ``trimoe fraud features``, bit for bit.

A dead node is believed lost after 3 s, a silent one after 12.  With RAY_health_check_period_ms=3000
RAY_health_check_timeout_ms=10000 RAY_health_check_failure_threshold=5, which are Ray's own, it
takes 15 and 65 s.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.platform import prepare_environment

_TRANSACTIONS = 9000
_RATE_TX_S = 150.0
_PATIENCE_S = "600"  # KubeRay's with Redis; after Ray's own 60 every process without a head ends


def main() -> int:
    """Run a case; the last line is its figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--kills", type=int, default=3, help="replica: how many")
    parser.add_argument("--transactions", type=int, default=_TRANSACTIONS, help="of the stream")
    parser.add_argument("--rate", type=float, default=_RATE_TX_S, help="transactions per second")
    parser.add_argument("--outage", type=float, default=15.0, help="head: seconds it is away")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare_environment()
    figures = {"case": args.case, **CASES[args.case](args)}
    line = json.dumps(figures)
    if args.json is not None:
        args.json.write_text(line + "\n", "utf-8")
    print(line)
    return 0 if _is_well(figures) else 1


def _is_well(figures: Mapping[str, Any]) -> bool:
    stream = figures.get("stream", {"is_exact": True, "worker_failures": []})
    probes = [figures[name] for name in ("probe", "http") if name in figures] or [figures]
    has_failed = any(probe["failed"] for probe in probes) or stream["worker_failures"]
    return stream["is_exact"] and not has_failed


def _replica(args: argparse.Namespace) -> dict[str, object]:
    from benchmarks.fault_replica import lose_replicas  # noqa: PLC0415 - after the environment

    return lose_replicas(args.kills)


def _node(args: argparse.Namespace) -> dict[str, object]:
    from benchmarks.fault_nodes import lose_node  # noqa: PLC0415 - as above
    from benchmarks.fault_stream import Flow  # noqa: PLC0415

    return lose_node(Flow(args.transactions, args.rate, seed=args.seed))


def _frozen(args: argparse.Namespace) -> dict[str, object]:
    from benchmarks.fault_nodes import lose_node  # noqa: PLC0415 - as above
    from benchmarks.fault_stream import Flow  # noqa: PLC0415

    return lose_node(Flow(args.transactions, args.rate, seed=args.seed), by_freezing=True)


def _rolling(args: argparse.Namespace) -> dict[str, object]:
    from benchmarks.fault_nodes import replace_nodes  # noqa: PLC0415 - as above
    from benchmarks.fault_stream import Flow  # noqa: PLC0415

    return replace_nodes(Flow(args.transactions, args.rate, seed=args.seed))


def _head(args: argparse.Namespace) -> dict[str, object]:
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _PATIENCE_S)
    from benchmarks.fault_head import restart_head  # noqa: PLC0415 - as above
    from benchmarks.fault_stream import Flow  # noqa: PLC0415

    return restart_head(Flow(args.transactions, args.rate, seed=args.seed), args.outage)


CASES: Mapping[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "replica": _replica,
    "node": _node,
    "frozen": _frozen,
    "rolling": _rolling,
    "head": _head,
}

if __name__ == "__main__":
    sys.exit(main())
