"""The windows of a seed, drawn once by all cores for every training that sees them.

    FOLDER/STEP.pt    what ``collate`` makes of a step's windows, about 15 MB

To turn and stretch a case takes half a second of a core; trainings beside each other on one GPU
would wait for it.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor
from torch.utils.data import Dataset

Packed = Mapping[str, Tensor]
CHUNK = 8  # steps that a process draws at once
_DRAWS: list[Callable[[int], Packed]] = []  # what this process draws with


class RecordedDraws(Dataset[dict[str, Tensor]]):
    """The windows of each step, packed, by its number.

    Args:
        folder: Of ``recorded``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Read the step's windows."""
        packed: dict[str, Tensor] = torch.load(self._folder / f"{step}.pt", weights_only=True)
        return packed


@contextmanager
def recorded(
    draw: Callable[[int], Packed], steps: int, folder: Path, processes: int
) -> Iterator[Path]:
    """Draw the windows of all steps into a folder, which lives as long as the block.

    Args:
        draw: Returns those of a step.
        steps: How many.
        folder: Made; what it held goes.
        processes: That draw.
    """
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")  # the volumes are there already
    try:
        with ProcessPoolExecutor(processes, fork, initializer=_begin, initargs=(draw,)) as pool:
            starts = range(0, steps, CHUNK)
            parts = [range(start, min(start + CHUNK, steps)) for start in starts]
            for done in [pool.submit(_draw, part, folder) for part in parts]:
                done.result()
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)


def _begin(draw: Callable[[int], Packed]) -> None:
    torch.set_num_threads(1)
    _DRAWS.append(draw)


def _draw(steps: range, folder: Path) -> None:
    for step in steps:
        torch.save(dict(_DRAWS[0](step)), folder / f"{step}.pt")
