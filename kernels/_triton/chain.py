"""A chain of launches: each begins while the one before it ends (programmatic dependent launch)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels._triton.numerics import INTERPRET
from kernels.moe_config import MoELaunch


@triton.jit
def begin(CHAINED: tl.constexpr) -> None:
    """Wait for what the last launch of a chain wrote, then let the next one come.

    In this order a launch may read before it waits what its predecessor itself was given, for it
    comes when each program of the predecessor has begun or ended.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


def is_chained(config: MoELaunch) -> bool:
    """Tell whether the launches of a configuration form a chain here."""
    return config.chained and not INTERPRET.value
