"""A padded batch gives what it gives alone; the graphs themselves need a GPU."""

from collections.abc import Callable

import pytest
import torch

from core_model.builtin_tasks import FRAUD
from core_model.graphs import StepGraphs
from core_model.model import MoETransformer
from core_model.packing import RaggedBatch
from core_model.task_graphs import BatchSlots, first_sequences

MakeBatch = Callable[..., RaggedBatch]


def to_device(batch: RaggedBatch, device: str) -> RaggedBatch:
    """Return a copy of a batch elsewhere."""
    extras = {name: values.to(device) for name, values in batch.extras.items()}
    return RaggedBatch(batch.features.to(device), batch.cu_seqlens.to(device), extras)


@pytest.mark.parametrize("lengths", [[1], [49, 1, 30], [49] * 7])
@torch.inference_mode()
def test_idle_sequences_change_nothing(
    model: MoETransformer, make_batch: MakeBatch, lengths: list[int]
) -> None:
    """Whatever an earlier step has left behind the batch, NaN too."""
    batch, slots = make_batch(lengths), BatchSlots.of(FRAUD, 8, torch.device("cpu"))
    slots.batch.features.fill_(torch.nan)
    slots.fill(batch)
    cu_seqlens = slots.batch.cu_seqlens
    assert torch.equal(cu_seqlens[: len(lengths) + 1], batch.cu_seqlens)
    assert int(cu_seqlens[-1]) == slots.batch.features.shape[0]
    idle = cu_seqlens[len(lengths) :].diff()
    assert int(idle.max() - idle.min()) <= 1
    padded = model.encode("fraud", slots.batch)
    ours, alone = first_sequences(padded, len(lengths)), model.encode("fraud", batch)
    torch.testing.assert_close(ours.tokens_TD, alone.tokens_TD)
    assert torch.equal(ours.cu_tokens, alone.cu_tokens)
    assert torch.equal(ours.cu_spans, alone.cu_spans)
    assert ours.longest_span == alone.longest_span
    torch.testing.assert_close(ours.side["tree"], alone.side["tree"])
    outputs, offsets = model.decode("fraud", padded.tokens_TD, padded)
    wanted, cu_rows = model.decode("fraud", alone.tokens_TD, alone)
    torch.testing.assert_close(outputs[: len(lengths)], wanted)
    assert torch.equal(offsets[: len(lengths) + 1], cu_rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_captured_step_equals_the_eager_one(model: MoETransformer, make_batch: MakeBatch) -> None:
    """Also after steps of other sizes, and beyond the largest bucket."""
    model = model.cuda()
    graphs = StepGraphs(model)
    for num_sequences in (1, 7, 8, 100, 3, 511, 600, 100):
        batch = to_device(make_batch([1 + (7 * i) % 49 for i in range(num_sequences)]), "cuda")
        model.graphs = None
        wanted = model({"fraud": batch})
        model.graphs = graphs
        got = model({"fraud": batch})
        for one, other in zip(got.outputs["fraud"], wanted.outputs["fraud"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert torch.equal(got.cu_tokens, wanted.cu_tokens)
