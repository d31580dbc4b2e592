"""Where a worker goes: the node that has the fewest, of those that will stay.

Placed by hand, because Ray's SPREAD does not look where the others are when one comes back, and
no strategy holds for an actor that needs no CPU at all (docs/log.md#faults).

Pure: nodes come in as arguments.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple


class Node(NamedTuple):
    """A node that is alive.

    Args:
        node_id: Ray's name for it, hexadecimal.
        num_cpus: Logical CPUs it offers to work; a head that is kept free offers none.
    """

    node_id: str
    num_cpus: float


def choose_node(
    nodes: Iterable[Node], taken: Iterable[str], avoided: Collection[str] = ()
) -> str | None:
    """Return the node for one more worker, None if there is no node.

    Args:
        nodes: All that are alive.
        taken: Node of each worker that runs.
        avoided: Nodes that are being drained or may be lost; used only if there is no other.
    """
    workers = Counter(taken)
    ranked = sorted(
        nodes,
        key=lambda node: (
            node.node_id in avoided,
            node.num_cpus <= 0,
            workers[node.node_id],
            node.node_id,
        ),
    )
    return ranked[0].node_id if ranked else None
