import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.geometry import (
    Gap,
    fill_gaps,
    find_gaps,
    step_reasons,
    tilt_reasons,
    unit_axes,
)
from apps.imaging.reading.source import RejectedError
from apps.imaging.stack import SliceStack


def at(*steps: float) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(steps)])


@pytest.mark.parametrize(
    ("steps", "gaps"),
    [
        ([5.0] * 9, []),
        ([5.0] * 4 + [10.0] + [5.0] * 4, [Gap(4, 1)]),
        ([5.0] * 4 + [15.0] + [5.0] * 9, [Gap(4, 2)]),
        ([5.0, 10.0], [Gap(1, 1)]),  # too few to know better than by the shortest
        ([4.0] * 13 + [1.08] + [7.0] * 13, []),
        ([4.0] * 9 + [1.08] + [7.0] * 4 + [14.0] + [7.0] * 4, [Gap(14, 1)]),
        ([4.0] * 9 + [8.0] + [4.0] * 3 + [7.0] * 9, [Gap(9, 1)]),
        ([4.0] * 13 + [8.08] + [7.0] * 12, []),  # where would the missing one have been?
        ([7.0, 7.0, 7.0, 14.0] * 2 + [7.0, 7.0, 7.0] + [4.0] * 9, [Gap(3, 1), Gap(7, 1)]),
        ([3.0] * 9 + [6.0] * 9, []),  # so many are no accident
        ([3.0, 3.0, 6.0] * 4 + [3.0], [Gap(k, 1) for k in (2, 5, 8, 11)]),
        ([5.0] * 4 + [7.5] + [5.0] * 4, []),  # no whole number of steps
        ([0.625, 0.6, 0.65, 0.6, 0.65] * 4, []),  # rounded places
        ([0.5] * 9 + [1.0] + [0.5] * 9, [Gap(9, 1)]),
    ],
)
def test_gaps_are_told_from_other_steps(steps: list[float], gaps: list[Gap]) -> None:
    bounds = Bounds(lost_share=0.3)
    assert find_gaps(at(*steps), bounds) == gaps
    assert find_gaps(100 - at(*steps)[::-1], bounds) == [
        Gap(len(steps) - 1 - gap.after, gap.num_missing) for gap in reversed(gaps)
    ]


@given(
    usual=st.floats(0.5, 7.0),
    num=st.integers(12, 40),
    dropped=st.sets(st.integers(1, 10), min_size=1, max_size=2),
)
def test_whatever_is_dropped_inside_comes_back_to_its_place(
    usual: float, num: int, dropped: set[int]
) -> None:
    places = usual * np.arange(num)
    left = np.delete(places, sorted(dropped))
    bounds = Bounds(gap_mm=3 * 7.0)
    filled, acquired = fill_gaps(stack_at(left), find_gaps(left, bounds))
    assert np.abs(filled.positions_mm - places).max() < 0.1
    assert set(np.flatnonzero(acquired < 0).tolist()) == dropped


def stack_at(positions: NDArray[np.float64]) -> SliceStack:
    num = len(positions)
    return SliceStack(
        hu=np.zeros((num, 2, 2), np.int16) + np.arange(num, dtype=np.int16)[:, None, None] * 30,
        origins_mm=positions[:, None] * np.array([0.0, 0.0, 1.0]),
        row_axis=np.array([1.0, 0.0, 0.0]),
        column_axis=np.array([0.0, 1.0, 0.0]),
        pixel_mm=(1.0, 1.0),
        is_interpolated=np.zeros(num, bool),
    )


def test_two_missing_slices_lie_a_third_and_two_thirds_between() -> None:
    stack, acquired = fill_gaps(stack_at(at(5, 15, 5)), [Gap(1, 2)])
    assert stack.positions_mm.tolist() == pytest.approx([0, 5, 10, 15, 20, 25])
    assert stack.hu[:, 0, 0].tolist() == [0, 30, 40, 50, 60, 90]
    assert acquired.tolist() == [0, 1, -1, -1, 2, 3]
    assert stack.is_interpolated.tolist() == [False, False, True, True, False, False]


def test_a_gap_beyond_the_bound_is_refused() -> None:
    positions = at(*[5.0] * 5, 20.0, *[5.0] * 5)
    with pytest.raises(RejectedError, match="GAP_TOO_WIDE"):
        find_gaps(positions, Bounds())
    assert find_gaps(positions, Bounds(gap_mm=20.0, lost_share=0.5)) == [Gap(5, 3)]


def test_costs_are_in_millimetres() -> None:
    positions = at(*[4.0] * 5, 8.0, *[4.0] * 5, *[7.0] * 5)
    gap, mixed = step_reasons(positions, [Gap(5, 1)], thickness_mm=4.0)
    assert (gap.code, gap.cost_mm) == ("GAP_INTERPOLATED", 4.0)
    assert (mixed.code, mixed.cost_mm) == ("MIXED_SPACING", 1.5)
    assert "10 x 4.00, 5 x 7.00" in mixed.detail
    (sparse,) = step_reasons(at(*[10.0] * 5), [], thickness_mm=1.0)
    assert (sparse.code, sparse.cost_mm) == ("SLICES_SPARSE", 4.5)
    assert step_reasons(at(*[2.5] * 5), [], thickness_mm=5.0) == []  # overlap is usual


@pytest.mark.parametrize("degrees", [0.0, 0.05, 12.0, -18.5])
def test_tilt_is_the_angle_between_normal_and_rise(degrees: float) -> None:
    angle = np.radians(degrees)
    row, column = unit_axes([1, 0, 0, 0, np.cos(angle), -np.sin(angle)])
    origins = np.outer(np.arange(9), [0.0, 0.0, 5.0])
    reasons = tilt_reasons(origins, np.cross(row, column))
    if abs(degrees) < 0.1:
        assert reasons == []
    else:
        assert [reason.code for reason in reasons] == ["TILT_SHEARED"]
        assert f"{abs(degrees):.1f} degrees" in reasons[0].detail


def test_axes_are_made_unit_and_right_angled() -> None:
    row, column = unit_axes([0.999, 0.004, 0, 0, 1.001, 0])
    assert np.linalg.norm(row) == pytest.approx(1)
    assert np.linalg.norm(column) == pytest.approx(1)
    assert row @ column == pytest.approx(0, abs=1e-12)
    with pytest.raises(RejectedError, match="ORIENTATION_INVALID"):
        unit_axes([1, 0, 0, 0.1, 1, 0])
