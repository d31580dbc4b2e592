"""What attention in packed sequences is given.

Legend: T packed positions, H heads, d head width, B sequences.
"""

from typing import NamedTuple

from torch import Tensor

from kernels.attention import AttentionPattern


class AttentionInputs(NamedTuple):
    """Queries, keys and values of packed sequences.

    Args:
        q: Queries, [T, H, d].
        k: Keys.
        v: Values.
        cu_seqlens: Sequence offsets, int32 [B+1].
        lengths: Of the sequences, known to the host.
        pattern: What sees what.
        grad: Gradient of the output, where the call is to go back as well.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    pattern: AttentionPattern
    grad: Tensor | None = None
