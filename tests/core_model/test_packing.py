import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_model.packing import (
    RaggedBatch,
    concat_cu_seqlens,
    offsets_from_lengths,
    segment_ids,
    take_sequences,
)

lengths_lists = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def pack(lengths: list[int]) -> RaggedBatch:
    cu_seqlens = offsets_from_lengths(torch.tensor(lengths))
    features = torch.arange(2.0 * sum(lengths)).view(-1, 2)
    return RaggedBatch(features, cu_seqlens, {"mark": torch.arange(len(lengths))})


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.data())
def test_taken_sequences_are_the_slices_they_name(lengths: list[int], data: st.DataObject) -> None:
    batch = pack(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=6))
    taken = take_sequences(batch, torch.tensor(chosen, dtype=torch.int64))
    starts = batch.cu_seqlens.tolist()
    slices = [batch.features[starts[i] : starts[i + 1]] for i in chosen]
    assert torch.equal(taken.features, torch.cat([batch.features[:0], *slices]))
    assert taken.cu_seqlens.tolist() == [
        sum(lengths[i] for i in chosen[:n]) for n in range(len(chosen) + 1)
    ]
    assert taken.cu_seqlens.dtype == torch.int32
    assert taken.extras["mark"].tolist() == chosen
    assert taken.num_sequences == len(chosen)


@settings(max_examples=30, deadline=None)
@given(lengths_lists)
def test_every_row_knows_its_sequence(lengths: list[int]) -> None:
    ids = segment_ids(pack(lengths).cu_seqlens, sum(lengths))
    assert ids.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


@settings(max_examples=30, deadline=None)
@given(st.lists(lengths_lists, min_size=1, max_size=4))
def test_joined_offsets_are_those_of_the_joined_sequences(parts: list[list[int]]) -> None:
    joined = concat_cu_seqlens([pack(lengths).cu_seqlens for lengths in parts])
    assert joined.tolist() == pack([n for lengths in parts for n in lengths]).cu_seqlens.tolist()
    assert joined.dtype == torch.int32
