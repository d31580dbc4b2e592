"""What the Triton forms agree on: the matrix product, its precision, and the range of 8 bits.

Tiles are multiplied with float32 accumulation; float32 operands as three tf32 products
(relative error about 1e-6).  Triton's interpreter multiplies bfloat16 bit patterns as
integers, so there the operands are widened first.
"""

import triton
import triton.language as tl
from triton import knobs

from kernels.fused_moe_fp8 import E4M3_MAX

INTERPRET = tl.constexpr(knobs.runtime.interpret)
LARGEST = tl.constexpr(E4M3_MAX)  # of float8_e4m3fn
LEAST = tl.constexpr(1e-30)  # smaller rows in 8 bits are 0: what they are divided by has an inverse


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """Return accumulator + left @ right, float32."""
    if INTERPRET:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision="tf32x3")
