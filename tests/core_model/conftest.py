"""Transactions drawn at random, and a tiny fraud model with trees and an opinionated gate."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from core_model.builtin_tasks import FRAUD, NUM_CONTEXT, NUM_ROW_COLUMNS
from core_model.config import PRESETS
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch, offsets_from_lengths
from core_model.tabular import TabularAdapter, TabularHead
from kernels.trees import TreeEnsemble

MakeBatch = Callable[..., RaggedBatch]
MakeEnsemble = Callable[[int], TreeEnsemble]


def draw_batch(lengths: Sequence[int], seed: int = 0) -> RaggedBatch:
    """Transactions with so many rows each: the event, then card and terminal rows."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int32))
    num = int(cu_seqlens[-1])

    def bits() -> torch.Tensor:
        return torch.randint(0, 2, (num,), generator=generator).float()

    kind, amount = bits() + 1, torch.rand(num, generator=generator) * 200
    age_s = torch.rand(num, generator=generator) * 3e6
    matured = (age_s > 604_800).float()
    ratio = torch.rand(num, generator=generator) * 3
    ratio[bits() > 0] = torch.nan
    columns = [kind, age_s, amount, matured, matured * bits(), bits(), ratio]
    features = torch.stack(columns, dim=1)
    events = cu_seqlens[:-1].long()
    features[events, 0], features[events, 1] = 0.0, 0.0
    features[events, 3:6] = 0.0
    assert features.shape[1] == NUM_ROW_COLUMNS
    context = torch.randn(len(lengths), NUM_CONTEXT, generator=generator) * 3
    context[torch.rand(context.shape, generator=generator) < 0.1] = torch.nan
    return RaggedBatch(features, cu_seqlens, {"context": context})


def draw_ensemble(seed: int) -> TreeEnsemble:
    """Seven trees of depth two."""
    generator = torch.Generator().manual_seed(seed)
    return TreeEnsemble(
        feature_SN=torch.randint(0, NUM_CONTEXT, (7, 3), generator=generator, dtype=torch.int32),
        threshold_SN=torch.randn(7, 3, generator=generator),
        missing_left_SN=torch.rand(7, 3, generator=generator) < 0.5,
        leaf_SL=torch.randn(7, 4, generator=generator) * 0.5,
        leaf_embedding_SLE=torch.randn(7, 4, NUM_CONTEXT, generator=generator) * 0.1,
        base=torch.tensor(-1.0),
    )


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small products gain nothing from a second thread and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_batch() -> MakeBatch:
    return draw_batch


@pytest.fixture
def make_ensemble() -> MakeEnsemble:
    return draw_ensemble


@pytest.fixture
def model() -> MoETransformer:
    torch.manual_seed(3)
    model = MoETransformer(PRESETS["tiny"], [FRAUD.name]).eval()
    adapter, head = model.adapters[FRAUD.name], model.heads[FRAUD.name]
    assert isinstance(adapter, TabularAdapter)
    assert isinstance(head, TabularHead)
    adapter.set_ensemble(draw_ensemble(1))
    torch.nn.init.normal_(head.gate.weight, std=0.3)  # zeros at birth: the gate would be constant
    return model
