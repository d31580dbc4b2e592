"""What a layer of experts is given.

Legend: T tokens, D model, F expert hidden, E experts, G = 2 F.
"""

from typing import NamedTuple

from torch import Tensor

from kernels.routing import Routing


class MoEInputs(NamedTuple):
    """Tokens, weights and who goes where.

    Args:
        x: Tokens, [T, D].
        logits: Scores that the routing was made of, float32 [T, E].
        gate_up: First F rows gate, last F rows up, [E, G, D].
        down: Second product, [E, D, F].
        routing: Weights, order and tiles.
    """

    x: Tensor
    logits: Tensor
    gate_up: Tensor
    down: Tensor
    routing: Routing
