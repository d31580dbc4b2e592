import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.fraud.merge import EventTimeMerge, Key

Records = list[list[tuple[int, int]]]  # per partition: rising (time, id)
WAIT_MS = 50


@st.composite
def sorted_partitions(draw: st.DrawFn) -> Records:
    times = draw(st.lists(st.integers(0, 20), max_size=40))
    owners = draw(st.lists(st.integers(0, 3), min_size=len(times), max_size=len(times)))
    partitions: Records = [[], [], [], []]
    for identifier, (time, owner) in enumerate(zip(times, owners, strict=True)):
        partitions[owner].append((time, identifier))
    return [sorted(partition) for partition in partitions]


@given(sorted_partitions(), st.randoms(use_true_random=False))
def test_any_interleaving_of_a_backlog_comes_out_sorted_and_whole(
    partitions: Records, rng: random.Random
) -> None:
    merge: EventTimeMerge[tuple[int, int]] = EventTimeMerge(range(4), WAIT_MS)
    left = [list(partition) for partition in partitions]
    out: list[tuple[int, int]] = []
    while any(left):
        source = rng.choice([p for p in range(4) if left[p]])
        for _ in range(rng.randint(1, len(left[source]))):
            record = left[source].pop(0)
            merge.push(source, record, record, broker_time_ms=0)
        out += merge.ready({p: 10**6 for p in range(4) if not left[p]})
    assert out == sorted(record for partition in partitions for record in partition)
    assert merge.num_buffered == merge.num_late == 0


@given(sorted_partitions(), st.integers(0, 3))
def test_nothing_later_leaves_while_an_empty_partition_is_behind(
    partitions: Records, slow: int
) -> None:
    merge: EventTimeMerge[tuple[int, int]] = EventTimeMerge(range(4), WAIT_MS)
    for partition, records in enumerate(partitions):
        if partition != slow:
            for record in records:
                merge.push(partition, record, record, 0)
    assert merge.ready({p: 10**9 for p in range(4) if p != slow}) == []
    assert merge.ready({}) == []


@given(sorted_partitions())
def test_caught_up_records_wait_exactly_the_reorder_time(partitions: Records) -> None:
    merge: EventTimeMerge[tuple[int, int]] = EventTimeMerge(range(5), WAIT_MS)
    for partition, records in enumerate(partitions):  # partition 4 stays empty
        for record in records:
            merge.push(partition, record, record, broker_time_ms=1000)
    late = dict.fromkeys(range(4), 10**9)  # others being read further does not help
    assert merge.ready({**late, 4: 1000 + WAIT_MS - 1}) == []
    assert len(merge.ready({**late, 4: 1000 + WAIT_MS})) == sum(map(len, partitions))


def test_full_heads_need_no_wait() -> None:
    merge: EventTimeMerge[str] = EventTimeMerge([0, 1], WAIT_MS)
    merge.push(0, "a", (1, 1), 1000)
    merge.push(1, "b", (2, 2), 1000)
    assert merge.ready({}) == ["a"]


def test_a_record_without_key_follows_its_predecessor() -> None:
    merge: EventTimeMerge[str] = EventTimeMerge([0, 1], 0)
    pushes: list[tuple[int, str, Key | None]] = [
        (0, "unreadable first", None),
        (0, "b", (5, 2)),
        (0, "unreadable", None),
        (0, "d", (9, 4)),
        (1, "a", (1, 1)),
        (1, "c", (7, 3)),
    ]
    for partition, item, key in pushes:
        merge.push(partition, item, key, 0)
    done = merge.ready({0: 0, 1: 0})
    assert done == ["unreadable first", "a", "b", "unreadable", "c", "d"]


def test_a_partition_out_of_order_keeps_its_order() -> None:
    merge: EventTimeMerge[str] = EventTimeMerge([0, 1], 0)
    for partition, item, key in [(0, "x", (5, 1)), (0, "late", (2, 2)), (1, "y", (4, 3))]:
        merge.push(partition, item, key, 0)
    assert merge.ready({0: 0, 1: 0}) == ["y", "x", "late"]
    assert merge.num_late == 1


def test_a_full_buffer_is_paused_until_it_drains() -> None:
    merge: EventTimeMerge[int] = EventTimeMerge([0, 1], 0, max_buffered=2)
    merge.push(0, 1, (1, 1), 0)
    assert merge.paused() == []
    merge.push(0, 2, (2, 2), 0)
    assert merge.paused() == [0]
    merge.ready({0: 0, 1: 0})
    assert merge.paused() == []


def test_an_unknown_partition_is_refused() -> None:
    merge: EventTimeMerge[int] = EventTimeMerge([0], 0)
    with pytest.raises(KeyError):
        merge.push(1, 1, (1, 1), 0)
