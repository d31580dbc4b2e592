"""What the attention kernels share: tiles that lie in one sequence each, and how rows are written.

The host knows how many rows T and sequences B there are, not where sequences end, and must not
wait for the device to tell.  So sequence s has its first tile at slot ``start // BLOCK + s``: the
slots of two sequences never meet, and ``T // BLOCK + B`` slots hold all.  A program finds the
sequence of its slot by bisection; a slot behind the last tile of its sequence stays idle.
"""

import triton
import triton.language as tl


@triton.jit
def find_tile(
    slot: tl.tensor,
    cu_ptr: tl.tensor,
    num_sequences: tl.tensor,
    num_halvings: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Sequence, its first row and end, and the tile of it that a slot holds."""
    low = slot * 0  # the last sequence known to begin at or before the slot
    high = low + num_sequences  # the first one known to begin behind it
    for _ in range(num_halvings):
        middle = (low + high) // 2
        right = tl.load(cu_ptr + middle) // BLOCK + middle <= slot
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    start = tl.load(cu_ptr + low)
    end = tl.load(cu_ptr + low + 1)
    return low, start, end, slot - start // BLOCK - low


@triton.jit
def row_offsets(stride: tl.tensor, BLOCK: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Offsets of the elements of a tile from its first one."""
    return tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def store_rows(
    base_ptr: tl.tensor,
    offset_Rd: tl.tensor,
    value_Rd: tl.tensor,
    num_inside: tl.tensor,
) -> None:
    """Write the first ``num_inside`` rows of a tile."""
    inside_R1 = (tl.arange(0, offset_Rd.shape[0]) < num_inside)[:, None]
    tl.store(base_ptr + offset_Rd, value_Rd.to(base_ptr.dtype.element_ty), mask=inside_R1)
