from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core_model.builtin_tasks import COLUMN_AMOUNT, FRAUD
from core_model.model import MoETransformer, StepOutput
from core_model.packing import Encoded, RaggedBatch, take_sequences
from core_model.tabular import TabularAdapter, TabularHead, pool_segments
from kernels.trees import TreeEnsemble, tree_ensemble

MakeBatch = Callable[..., RaggedBatch]
MakeEnsemble = Callable[[int], TreeEnsemble]
LENGTHS = (5, 1, 12, 3, 1, 30, 2)


@torch.no_grad()
def step(model: MoETransformer, batch: RaggedBatch) -> StepOutput:
    return model({FRAUD.name: batch})  # type: ignore[no-any-return]


def answer(model: MoETransformer, batch: RaggedBatch) -> dict[str, Tensor]:
    """Output columns by name."""
    columns, _ = step(model, batch).outputs[FRAUD.name]
    return dict(zip(FRAUD.outputs, columns.unbind(dim=1), strict=True))


def tree_answers(model: MoETransformer, batch: RaggedBatch) -> Tensor:
    adapter = model.adapters[FRAUD.name]
    assert isinstance(adapter, TabularAdapter)
    logit, contributions = tree_ensemble(batch.extras["context"], adapter.ensemble)
    return torch.cat([logit.unsqueeze(1), contributions], dim=1)


def showing(batch: RaggedBatch, tree_BC: Tensor) -> RaggedBatch:
    extras = {**batch.extras, "tree": tree_BC}
    return RaggedBatch(batch.features, batch.cu_seqlens, extras)


def test_packed_transactions_answer_as_each_alone(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS)
    together = answer(model, batch)
    for i in range(len(LENGTHS)):
        alone = answer(model, take_sequences(batch, torch.tensor([i])))
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][i], atol=2e-5, rtol=2e-5)


def test_answers_are_finite_and_differ(model: MoETransformer, make_batch: MakeBatch) -> None:
    got = answer(model, make_batch((1,) * 6))  # no history at all
    assert all(bool(column.isfinite().all()) for column in got.values())
    assert got["logit"].unique().numel() == 6


def test_history_moves_the_sequence_logit_alone(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS)
    before = answer(model, batch)
    batch.features[3, COLUMN_AMOUNT] += 150.0  # a history row of the first transaction
    after = answer(model, batch)
    assert abs(float(after["sequence_logit"][0] - before["sequence_logit"][0])) > 1e-3
    torch.testing.assert_close(after["sequence_logit"][1:], before["sequence_logit"][1:])
    assert torch.equal(after["tree_logit"], before["tree_logit"])


def test_order_of_history_rows_does_not_matter(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch((6,))
    shuffled = RaggedBatch(batch.features[[0, 4, 2, 5, 1, 3]], batch.cu_seqlens, batch.extras)
    expected = answer(model, batch)["sequence_logit"]
    torch.testing.assert_close(answer(model, shuffled)["sequence_logit"], expected)


def test_the_sequence_logit_does_not_know_the_tree(
    model: MoETransformer, make_batch: MakeBatch, make_ensemble: MakeEnsemble
) -> None:
    batch = make_batch(LENGTHS)
    before = answer(model, batch)
    adapter = model.adapters[FRAUD.name]
    assert isinstance(adapter, TabularAdapter)
    adapter.set_ensemble(make_ensemble(9))
    after = answer(model, batch)
    torch.testing.assert_close(after["sequence_logit"], before["sequence_logit"])
    assert not torch.allclose(after["tree_logit"], before["tree_logit"], atol=1e-2)
    assert not torch.allclose(after["gate"], before["gate"], atol=1e-4)


def test_the_logit_lies_between_tree_and_sequence(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    got = answer(model, make_batch(LENGTHS * 4))
    low = torch.minimum(got["tree_logit"], got["sequence_logit"])
    high = torch.maximum(got["tree_logit"], got["sequence_logit"])
    assert bool(((got["logit"] > low) & (got["logit"] < high)).all())
    mixed = got["tree_logit"] + got["gate"] * (got["sequence_logit"] - got["tree_logit"])
    torch.testing.assert_close(got["logit"], mixed)


def test_the_gate_reads_both_tokens_of_the_second_span(model: MoETransformer) -> None:
    head = model.heads[FRAUD.name]
    assert isinstance(head, TabularHead)
    tokens_TD = torch.randn(6, model.config.d_model)
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    encoded = Encoded(tokens_TD, offsets, offsets, {"tree": torch.zeros(2, 25)})
    columns, _ = head(tokens_TD, encoded)
    for i in range(2):
        opinion = head.opinion(tokens_TD[3 * i])
        gate = torch.sigmoid(head.gate(torch.cat([tokens_TD[3 * i + 1], tokens_TD[3 * i + 2]])))
        torch.testing.assert_close(columns[i, 2:4], torch.cat([opinion, gate]))


def test_tree_columns_are_those_of_the_ensemble(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS)
    columns, offsets = step(model, batch).outputs[FRAUD.name]
    expected = tree_answers(model, batch)
    assert torch.equal(columns[:, 1], expected[:, 0])
    assert torch.equal(columns[:, 4:], expected[:, 1:])
    assert offsets.tolist() == list(range(len(LENGTHS) + 1))


def test_without_its_tree_a_transaction_answers_the_sequence_logit(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS)
    served, tree_BC = answer(model, batch), tree_answers(model, batch)
    tree_BC[[0, 3, 6]] = torch.nan
    got = answer(model, showing(batch, tree_BC))
    torch.testing.assert_close(got["sequence_logit"], served["sequence_logit"])
    assert torch.equal(got["logit"][[0, 3, 6]], got["sequence_logit"][[0, 3, 6]])
    assert got["gate"][[0, 3, 6]].tolist() == [1.0] * 3
    shown = [1, 2, 4, 5]
    torch.testing.assert_close(got["logit"][shown], served["logit"][shown])


def test_token_counts_are_those_the_scheduler_expects(
    model: MoETransformer, make_batch: MakeBatch
) -> None:
    batch = make_batch(LENGTHS)
    encoded = model.adapters[FRAUD.name](batch)
    counts = FRAUD.count_tokens(batch.cu_seqlens.diff().numpy())
    assert encoded.cu_tokens.diff().tolist() == counts.tolist()
    assert encoded.cu_spans.diff().tolist() == [1, 2] * len(LENGTHS)
    assert encoded.tokens_TD.shape[0] == counts.sum() <= FRAUD.max_tokens * len(LENGTHS)


def test_a_withheld_span_has_no_tokens(model: MoETransformer, make_batch: MakeBatch) -> None:
    batch = make_batch((2, 2, 2))
    tree_BC = tree_answers(model, batch)
    tree_BC[1] = torch.nan
    encoded = model.adapters[FRAUD.name](showing(batch, tree_BC))
    assert encoded.cu_tokens.diff().tolist() == [3, 1, 3]
    assert encoded.cu_spans.diff().tolist() == [1, 2, 1, 1, 2]


def test_scaling_leaves_undefined_values_out(model: MoETransformer, make_batch: MakeBatch) -> None:
    adapter = model.adapters[FRAUD.name]
    assert isinstance(adapter, TabularAdapter)
    context_BC = make_batch((1,) * 50).extras["context"]
    adapter.fit_scaling(context_BC)
    column = context_BC[:, 4]
    known = column[~column.isnan()]
    assert known.numel() < 50
    scaled = known.sign() * known.abs().log1p()
    assert float(adapter.context_mean[4]) == pytest.approx(float(scaled.mean()), abs=1e-5)
    spread = float(scaled.std(unbiased=False))
    assert float(adapter.context_std[4]) == pytest.approx(spread, abs=1e-5)


def test_pooling_is_attention_beside_a_silent_row() -> None:
    torch.manual_seed(0)
    keys, values, queries = torch.randn(5, 6), torch.randn(5, 6), torch.randn(3, 6)
    segments_R = torch.tensor([0, 0, 2, 0, 2])  # segment 1 is empty
    got = pool_segments(keys, values, queries, segments_R, num_heads=2)
    for segment in range(3):
        mine = segments_R == segment
        for head in (slice(0, 3), slice(3, 6)):
            scores = keys[mine, head] @ queries[segment, head] * 3**-0.5
            weights = torch.cat([scores, torch.zeros(1)]).softmax(dim=0)[:-1]
            torch.testing.assert_close(got[segment, head], weights @ values[mine, head])
