"""The report of one case: one HTML file, readable offline, without scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.imaging.case import Case
from apps.imaging.finding import Findings, Organ
from apps.imaging.outputs.anatomy import anatomy_of
from apps.imaging.outputs.coronal import CoronalView, coronal_view
from apps.imaging.outputs.derived import NOTICE
from apps.imaging.outputs.orientation import letter_of
from apps.imaging.outputs.overlay import (
    CERTAIN,
    CERTAIN_RGB,
    CONFIDENCE_OPACITY,
    DOUBTFUL,
    DOUBTFUL_RGB,
    GLOBAL_RGB,
    LOCAL_RGB,
    SlicePicture,
    jpeg_of,
    picture_of,
)
from apps.imaging.outputs.pages import css_colour, data_uri, page, ramp
from apps.imaging.outputs.selection import body_region
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.stack import SliceStack

MAX_PIXELS = 640  # of a picture in the page; a larger matrix is thinned
CONFIDENCE_STEP, EXPERT_STEP = 2, 4  # these layers have no fine detail


@dataclass(frozen=True, slots=True)
class Extras:
    """What the page says beside the case and its findings.

    Args:
        slices: Indices of those shown, in order.
        files: Of the case, relative to the page.
        notes: Sentences on what is not written, or not as one might think.
    """

    slices: tuple[int, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]


def quarantine_page(case: Case, settings: OutputSettings) -> str:
    """Return the page of a case without findings: why there are none."""
    return page("case.html").render(_common(case, settings), findings=None, slides=[])


def case_page(
    case: Case, stack: SliceStack, findings: Findings, extras: Extras, settings: OutputSettings
) -> str:
    """Return the page of a case.

    Args:
        case: As read.
        stack: Its slices.
        findings: On their grid.
        extras: Which slices are shown, what else there is.
        settings: Say whether the source may be named.
    """
    region = body_region(stack, extras.slices)
    coronal = coronal_view(stack, findings, region[1])
    height_mm, width_mm = np.array(stack.hu[0][region].shape) * stack.pixel_mm
    return page("case.html").render(
        _common(case, settings),
        findings=findings,
        stack=stack,
        num_filled=int(stack.is_interpolated.sum()),
        cost_mm=max((reason.cost_mm for reason in case.reasons), default=0.0),
        slides=[
            _slide(picture_of(stack, findings, index, region), stack, findings)
            for index in extras.slices
        ],
        first=_first_shown(extras.slices, findings),
        sides=_sides(stack),
        aspect=f"{width_mm:.2f}/{height_mm:.2f}",
        organs=[_organ(organ) for organ in findings.organs],
        coronal=_coronal(coronal, stack, findings, extras.slices) if coronal else None,
        stages=_stages(findings.seconds),
        total_s=sum(findings.seconds.values()),
        files=[path for path in extras.files if "/" not in path],
        pictures=[path for path in extras.files if "/" in path],
        notes=extras.notes,
        certain=CERTAIN,
        doubtful=DOUBTFUL,
        confidence_ramp=ramp(
            [css_colour(CERTAIN_RGB, 0.15), css_colour(DOUBTFUL_RGB, CONFIDENCE_OPACITY)]
        ),
        expert_ramp=ramp(
            [
                css_colour(GLOBAL_RGB),
                css_colour(GLOBAL_RGB, 0.0),
                css_colour(LOCAL_RGB, 0.0),
                css_colour(LOCAL_RGB),
            ]
        ),
    )


def _common(case: Case, settings: OutputSettings) -> Mapping[str, Any]:
    return {
        "case": case,
        "source": case.source if settings.keep_identity else "",
        "keep_identity": settings.keep_identity,
        "notice": NOTICE,
    }


def _first_shown(slices: Sequence[int], findings: Findings) -> int:
    """Return the slice with the most organs: what the page opens with."""
    return max(slices, key=lambda index: len(_names(findings, index)))


def _sides(stack: SliceStack) -> Mapping[str, str]:
    """Return the letters at the edges of a slice."""
    axes = {"right": stack.row_axis, "bottom": stack.column_axis}
    axes |= {"left": -stack.row_axis, "top": -stack.column_axis}
    return {side: letter_of(axis) for side, axis in axes.items()}


def _names(findings: Findings, index: int) -> list[str]:
    on_slice = np.flatnonzero(np.bincount(findings.labels[index].ravel(), minlength=256))
    return [anatomy_of(o.name).title for o in findings.organs if o.label in on_slice]


def _slide(picture: SlicePicture, stack: SliceStack, findings: Findings) -> Mapping[str, Any]:
    index = picture.index
    return {
        "index": index,
        "position_mm": float(stack.positions_mm[index]),
        "is_filled": bool(stack.is_interpolated[index]),
        "names": _names(findings, index),
        **_layers(picture),
    }


def _layers(picture: SlicePicture) -> Mapping[str, str]:
    step = -(-max(picture.grey.shape) // MAX_PIXELS)
    return {
        "grey": data_uri(jpeg_of(np.ascontiguousarray(picture.grey[::step, ::step])), "jpeg"),
        "organs": data_uri(picture.organs.thinned(step).png(), "png"),
        "outlines": data_uri(picture.outlines.thinned(step).png(), "png"),
        "confidence": data_uri(picture.confidence.thinned(CONFIDENCE_STEP * step).png(), "png"),
        "experts": data_uri(picture.experts.thinned(EXPERT_STEP * step).png(), "png"),
    }


def _organ(organ: Organ) -> Mapping[str, Any]:
    anatomy = anatomy_of(organ.name)
    return {
        "title": anatomy.title,
        "colour": css_colour(anatomy.colour),
        "is_found": organ.box is not None,
        "volume_ml": organ.volume_ml,
        "mean_hu": organ.mean_hu,
        "sd_hu": organ.sd_hu,
        "confidence": organ.confidence,
        "is_sure": organ.is_sure,
    }


def _coronal(
    view: CoronalView, stack: SliceStack, findings: Findings, shown: Sequence[int]
) -> Mapping[str, Any]:
    heights = (100 * view.heights).round(2)
    extent_mm = stack.positions_mm[-1] - stack.positions_mm[0]
    return {
        "row": view.row + 1,
        "is_coronal": view.is_coronal,
        "up": view.up,
        "grey": data_uri(jpeg_of(view.grey), "jpeg"),
        "organs": data_uri(view.organs.png(), "png"),
        "aspect": f"{view.grey.shape[1] * stack.pixel_mm[1]:.2f}/{extent_mm:.2f}",
        "shown": [float(heights[index]) for index in shown],
        "ticks": [
            {"y": float(y), "is_filled": bool(filled)}
            for y, filled in zip(heights, stack.is_interpolated, strict=True)
        ],
        "reaches": [
            _reach(organ, place, heights.tolist())
            for place, organ in enumerate(findings.organs)
            if organ.box is not None
        ],
    }


def _reach(organ: Organ, place: int, heights: list[float]) -> Mapping[str, Any]:
    """Return the bar of an organ: from its first slice to its last."""
    ends = [heights[organ.box[0]], heights[organ.box[3] - 1]] if organ.box else [0.0, 0.0]
    return {
        "x": 24 + 11 * place,
        "y": min(ends),
        "height": max(max(ends) - min(ends), 0.6),
        "colour": css_colour(anatomy_of(organ.name).colour),
    }


def _stages(seconds: Mapping[str, float]) -> list[Mapping[str, Any]]:
    total = sum(seconds.values()) or 1.0
    return [
        {"name": name, "seconds": value, "share": value / total} for name, value in seconds.items()
    ]
