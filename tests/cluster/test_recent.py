"""The sliding minimum, beside the least of a list."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.recent import RecentMinimum

MEMORY_S = 10.0


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 8)), max_size=40))
def test_it_is_the_least_of_the_stretch(noted: list[tuple[int, float]]) -> None:
    recent, seen, now = RecentMinimum(MEMORY_S), [(np.inf, np.inf)], 0.0
    for value, pause_s in noted:
        now += pause_s
        recent.note(value, now)
        seen.append((value, now))
        now += pause_s
        assert recent.least(now) == min(v for v, at in seen if now - at < MEMORY_S)


def test_nothing_noted_is_infinite() -> None:
    recent = RecentMinimum(MEMORY_S)
    assert recent.least(0.0) == np.inf
    recent.note(1.0, 0.0)
    assert recent.least(MEMORY_S) == np.inf
