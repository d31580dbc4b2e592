"""The task of ``benchmarks.kernel_retrieval``: every answer stands behind its key, once."""

import itertools

import pytest
import torch

from benchmarks.kernel_retrieval import Trainer
from benchmarks.kernel_retrieval_model import (
    LEAST_WANTED,
    SETUP,
    Layer,
    Recaller,
    covered,
    draw,
)
from kernels.block_sparse import SparsePattern

FEW = SparsePattern(1, 0, 0, query_block=16, key_block=8, pool=2)
ALL = SparsePattern(64, 0, 0, query_block=16, key_block=8, pool=2)


def test_answers_stand_behind_their_keys() -> None:
    tokens, answers = draw(SETUP, 64, 16, 3, torch.Generator().manual_seed(0))
    first_value = 1 + SETUP.num_fillers + SETUP.num_names
    for row, values in zip(tokens, answers, strict=True):
        body, queries = row[: 64 - SETUP.num_pairs], row[64 - SETUP.num_pairs :]
        for query, value in zip(queries, values, strict=True):
            (where,) = (body == query).nonzero()
            assert row[where + 1] == value + first_value


def test_patterns_that_attend_to_all_answer_like_dense_attention() -> None:
    model, batch = Recaller(SETUP), draw(SETUP, 64, 16, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(batch, ALL), model(batch, None), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(batch, FEW), model(batch, None), atol=1e-3)


@torch.no_grad()
def test_all_blocks_hold_all_mass() -> None:
    model, batch = Recaller(SETUP), draw(SETUP, 64, 16, 2, torch.Generator().manual_seed(0))
    whole, few = covered(model, batch, ALL), covered(model, batch, FEW)
    assert whole.mass.min() > 1 - 1e-5
    assert whole.keys.min() == 1
    assert few.mass.max() < 0.9
    assert (few.mass.mean() <= few.best.mean() + 1e-6).all()


@torch.no_grad()
def test_scores_mislead_by_their_cross_entropy_with_what_is_wanted() -> None:
    """The formula, span by span, in the first layer of a model whose attention is uneven."""
    torch.manual_seed(0)
    model, batch = Recaller(SETUP), draw(SETUP, 64, 16, 1, torch.Generator().manual_seed(0))
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    layer.sharpness.mul_(20.0)
    found = covered(model, batch, FEW).misled[0]
    q, k, _ = (each.transpose(0, 1) for each in layer.project(model.embedding(batch.tokens)))
    scale, seen = q.shape[2] ** -0.5, 0
    weight_HQK = (q @ k.transpose(1, 2) * scale).softmax(dim=2)
    for head, block in itertools.product(range(len(q)), range(64 // FEW.query_block)):
        rows = slice(block * FEW.query_block, (block + 1) * FEW.query_block)
        others = [j for j in range(8) if j // 2 != block]  # its own two are never chosen
        keys = [slice(8 * j, 8 * j + 8) for j in others]
        spans = [(k[head, each] - k[head].mean(0)).unflatten(0, (4, 2)).sum(1) for each in keys]
        score = torch.stack([(q[head, rows] @ each.T * scale).max() for each in spans])
        wanted = torch.stack([weight_HQK[head, rows, each].sum(1).max() for each in keys])
        seen += int((wanted > LEAST_WANTED).sum())
        want = -(wanted * (wanted > LEAST_WANTED) * score.log_softmax(0)).sum()
        torch.testing.assert_close(found[head, block], want, atol=1e-4, rtol=1e-4)
    assert 0 < seen < len(q) * 4 * 6  # some are wanted, some are not


@pytest.mark.slow
def test_the_first_stage_is_learnt() -> None:
    setup = SETUP._replace(stages=SETUP.stages[:1])
    trainer = Trainer(setup, "cpu", seed=0, seconds=1200.0)
    trainer.learn_dense()
    assert trainer.step < 400  # 221 were seen; with nothing learnt it goes on for ten minutes
