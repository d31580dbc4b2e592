"""How a request is cut into pieces."""

import numpy as np

from cluster.work import Work
from core_model.chunks import num_pieces


def test_short_sequences_are_pieces_themselves() -> None:
    work = Work.cut(np.array([3, 5]), chunk_tokens=8, num_layers=4)
    assert work.tokens.tolist() == [3, 5]
    assert not work.is_cut
    assert not Work.cut(np.array([3, 500]), chunk_tokens=0, num_layers=4).is_cut


def test_a_long_sequence_has_a_piece_per_chunk_and_layer() -> None:
    work = Work.cut(np.array([5, 100, 5]), chunk_tokens=32, num_layers=3)
    assert work.num_pieces == 2 + num_pieces(100, 32, 3)
    assert np.bincount(work.sequence).tolist() == [1, 16, 1]
    assert work.is_whole.tolist() == [True, *[False] * 16, True]
    assert 80 <= work.tokens[1:-1].sum() <= 100  # about its tokens in all


def test_even_pieces_add_up_to_each_sequence() -> None:
    work = Work.even(np.array([7, 100]), 3)
    assert work.tokens.tolist() == [2, 2, 3, 33, 33, 34]
    assert work.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert work.is_cut
