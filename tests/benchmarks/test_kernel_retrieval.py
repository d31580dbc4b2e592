"""The task of ``benchmarks.kernel_retrieval``: every answer stands behind its key, once."""

import torch

from benchmarks.kernel_retrieval import CPU, Recaller, attended_mass, draw
from kernels.block_sparse import SparsePattern


def test_answers_stand_behind_their_keys() -> None:
    batch = draw(CPU, 64, 3, torch.Generator().manual_seed(0))
    rows = batch.tokens.view(3, 64)
    for number, place in enumerate(batch.places.tolist()):
        row, position = divmod(place, 64)
        (where,) = (rows[row, : 64 - CPU.num_queries] == rows[row, position]).nonzero()
        assert rows[row, where + 1] == batch.answers[number] + 1 + CPU.num_names


def test_all_blocks_hold_all_mass() -> None:
    model = Recaller(CPU)
    batch = draw(CPU, 64, 1, torch.Generator().manual_seed(0))
    whole = SparsePattern(64, 0, 0, query_block=16, key_block=8, pool=2)
    few = SparsePattern(1, 0, 0, query_block=16, key_block=8, pool=2)
    with torch.no_grad():
        assert min(attended_mass(model, batch, whole)) > 1 - 1e-5
        assert max(attended_mass(model, batch, few)) < 0.9
