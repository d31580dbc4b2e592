"""A barrier between all programs of one launch, so that a second launch is not needed.

The launch must be cooperative (``launch_cooperative_grid=True``): the driver then starts all its
programs together or none.  The word that they count in needs no reset: each pass adds 2^31 in
all, so the low bits come back to what they were and the top bit flips.  Launches that may run at
the same time have words of their own.

Triton's interpreter runs programs one after the other, so there nobody may wait: callers launch
what comes before and what comes after by themselves.

Source:
    Grid synchronisation of CUDA's cooperative groups.
"""

from collections import defaultdict
from functools import cache
from itertools import count

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WORDS = 1 << 16  # captured calls of a device until words are used again: 256 KiB
STREAM_WORDS = 1 << 10  # of them for eager calls
NOMINAL_PROCESSORS = 4  # where there is no device: enough for several programs


@triton.jit
def grid_barrier(word_ptr: tl.tensor, num_programs: tl.tensor) -> None:
    """Wait for all programs of axis 0; what any of them stored before is seen by all after."""
    tl.debug_barrier()  # all threads of this program have stored
    rest = 0x7FFFFFFF - num_programs + 2  # 2^31 less the others; nobody calls with one program
    step = tl.where(tl.program_id(0) == 0, rest, 1)
    before = tl.atomic_add(word_ptr, step, sem="acq_rel")
    now = before
    while (now ^ before) >= 0:  # until the top bit differs
        now = tl.atomic_add(word_ptr, 0, sem="acquire")
    tl.debug_barrier()


@cache
def _words(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        message = "expected a call before the first capture, which zeroes the words of barriers"
        raise RuntimeError(message)
    words = torch.zeros(NUM_WORDS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams use them too
    return words


_stream_word: defaultdict[tuple[torch.device, int], int] = defaultdict(count().__next__)
_captured_word = count()


def barrier_word(device: torch.device) -> tuple[Tensor, int]:
    """Return the words of a device, and which of them the next launch counts in.

    Calls on a stream follow each other and share one; each captured call has its own.
    """
    words = _words(device)
    if device.type != "cuda":
        return words, 0
    if torch.cuda.is_current_stream_capturing():
        return words, STREAM_WORDS + next(_captured_word) % (NUM_WORDS - STREAM_WORDS)
    stream = torch.cuda.current_stream(device).cuda_stream
    return words, _stream_word[device, stream] % STREAM_WORDS


@cache
def num_processors(device: torch.device) -> int:
    """Return how many programs can certainly run together, one on each multiprocessor."""
    if device.type != "cuda":
        return NOMINAL_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
