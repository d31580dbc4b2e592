"""What a measured op is: its cases, those who can run them, its work and its exact result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from benchmarks.kernel_roofline import Work

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")
Call = Callable[[], Tensor]
OURS = "ours"


class AbsentError(Exception):
    """A peer that cannot run here, or not this case; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer(Generic[Inputs]):
    """Someone who runs an op.

    Args:
        name: As printed; ours begin with ``OURS``.
        prepare: Brings one set of inputs into the peer's own form, which is not measured, and
            returns the call, which gives the op's first output; raises AbsentError, ImportError.
        is_compiled: Each shape takes seconds to compile, so it comes after all others.
        does_less: What it leaves out, so that its result is not compared.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    is_compiled: bool = False
    does_less: str = ""


@dataclass(frozen=True, slots=True)
class Case(Generic[Inputs]):
    """A shape to measure.

    Args:
        model: Whose shape.
        size: Tokens, rows or positions.
        routing: "uniform", "zipf", or "-" where nothing is routed.
        dtype: Of the data.
        draw: Returns one set of random inputs.
    """

    model: str
    size: int
    routing: str
    dtype: torch.dtype
    draw: Callable[[torch.Generator], Inputs]


@dataclass(frozen=True, slots=True)
class Op(Generic[Inputs]):
    """An op and all that is needed to measure it.

    Args:
        name: As on the command line.
        cases: Returns those for a device; on a CPU tiny ones.
        peers: Ours first.
        work: What one call must do.
        exact: Some rows of the first output, and their values in float64.
    """

    name: str
    cases: Callable[[str], Sequence[Case[Inputs]]]
    peers: Sequence[Peer[Inputs]]
    work: Callable[[Inputs], Work]
    exact: Callable[[Inputs], tuple[Tensor, Tensor]]

    def rivals(self, *, is_compiled: bool) -> Sequence[Peer[Inputs]]:
        """Return those that compile for seconds, or the others."""
        return [peer for peer in self.peers if peer.is_compiled == is_compiled]


def demand_gpu(tensor: Tensor) -> None:
    """Raise AbsentError for a tensor in the memory of a CPU."""
    if not tensor.is_cuda:
        message = "needs a GPU"
        raise AbsentError(message)


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return the function compiled for each shape anew, by search, without graphs of its own.

    The harness captures it like everyone else; graphs of the compiler would copy the weights of
    each set of inputs.
    """
    torch._dynamo.config.recompile_limit = 64
    made: Callable[..., Result] = torch.compile(
        function, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs"
    )
    return made


def spread_rows(num_rows: int, most: int, device: torch.device) -> Tensor:
    """Return at most so many rows from the first to the last, evenly apart, int64."""
    count = min(num_rows, most)
    return torch.linspace(0, num_rows - 1, count, dtype=torch.float64, device=device).round().long()
