"""Which slices of a series have one geometry; the others are set aside and counted."""

from collections import Counter
from collections.abc import Callable, Sequence

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.headers import Frame
from apps.imaging.reading.source import RejectedError
from apps.imaging.reasons import Reason

ORIENTATION_ERROR = 1e-3  # of a component
PIXEL_ERROR_MM = 1e-4  # 0.05 mm over 512 pixels

Value = tuple[float, ...] | str
Aspect = tuple[str, str, Callable[[Frame], Value | None], float]

ASPECTS: tuple[Aspect, ...] = (
    ("POSITION", "position", lambda frame: frame.position_mm, float("inf")),
    ("ORIENTATION", "orientation", lambda frame: frame.orientation, ORIENTATION_ERROR),
    ("PIXEL_SPACING", "pixel spacing", lambda frame: frame.pixel_mm, PIXEL_ERROR_MM),
    ("SLICE_SIZE", "size", lambda frame: frame.shape, 0.0),
    ("FRAME_OF_REFERENCE", "frame of reference", lambda frame: frame.frame_of_reference, 0.0),
)


class Losses:
    """Counts the slices of a series that are set aside.

    Args:
        total: Slices of the series, and files that may have been one.
        bounds: How many may be lost.
        found: Takes a reason for each kind of loss.
    """

    def __init__(self, total: int, bounds: Bounds, found: list[Reason]) -> None:
        self._total = total
        self._allowed = max(1.0, bounds.lost_share * total)
        self._found = found
        self._num = 0

    def add(self, code: str, detail: str, num: int) -> None:
        """Note that slices are set aside.

        Raises:
            RejectedError: They are all, or too many.
        """
        self._num += num
        text = f"{num} of {self._total} slices set aside: {detail}"
        if self._num >= self._total or self._num > self._allowed:
            raise RejectedError(code, text)
        self._found.append(Reason(code, text))


def agreeing(frames: Sequence[Frame], losses: Losses) -> list[int]:
    """Return the indices of slices that have a geometry, the same as most others.

    Args:
        frames: Of a series, at least one.
        losses: Takes those that have not.

    Raises:
        RejectedError: Too many have not.
    """
    kept = list(range(len(frames)))
    for code, name, value_of, error in ASPECTS:
        values = {k: value_of(frames[k]) for k in kept}
        missing = [k for k in kept if values[k] is None]
        if missing:
            losses.add(f"{code}_MISSING", f"expected a {name}, got none", len(missing))
        stated = Counter(value for value in values.values() if value)
        usual = max(stated, key=lambda value: stated[value], default=None)
        other = [k for k in kept if not _is_near(values[k], usual, error)]
        if other:
            losses.add(f"{code}_MISMATCH", f"expected the {name} of the others", len(other))
        kept = sorted(set(kept) - set(missing) - set(other))
    return kept


def _is_near(value: Value | None, usual: Value | None, error: float) -> bool:
    if not value or usual is None:  # says nothing
        return True
    if isinstance(value, str) or isinstance(usual, str):
        return value == usual
    return all(abs(a - b) <= error for a, b in zip(value, usual, strict=True))
