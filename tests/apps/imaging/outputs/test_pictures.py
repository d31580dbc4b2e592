"""Which slices are shown, and what their pictures say."""

from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image

from apps.imaging.outputs.anatomy import ANATOMY
from apps.imaging.outputs.coronal import coronal_view
from apps.imaging.outputs.montage import montage_of
from apps.imaging.outputs.overlay import grey_of, organ_layer, picture_of, png_of, rgb_of
from apps.imaging.outputs.selection import choose_slices
from tests.apps.imaging.outputs.scan import ORGANS, Sample


def test_every_organ_is_shown_near_its_largest_section(plain: Sample) -> None:
    chosen = choose_slices(plain.stack, plain.findings)
    assert 1 < len(chosen) <= 9
    assert list(chosen) == sorted(set(chosen))
    for label, *_ in ORGANS.values():
        areas = (plain.findings.labels == label).sum(axis=(1, 2))
        assert areas[list(chosen)].max() >= 0.8 * areas.max()


def test_the_least_certain_slice_and_a_filled_one_are_shown(filled: Sample) -> None:
    confidence = filled.findings.confidence.copy()
    confidence[9], confidence[15] = 250, 90
    findings = replace(filled.findings, confidence=confidence)
    chosen = choose_slices(filled.stack, findings)
    assert 15 in chosen
    assert 9 in chosen


def test_without_organs_slices_at_equal_distances_are_shown(without_organs: Sample) -> None:
    assert choose_slices(without_organs.stack, without_organs.findings) == (3, 7, 11, 15)


def test_the_window_is_the_usual_one_for_soft_tissue() -> None:
    hu = np.array([[-1000, -160, 40, 240, 3000]], dtype=np.int16)
    assert grey_of(hu).tolist() == [[0, 0, 128, 255, 255]]


def test_an_outline_is_the_rim_of_an_organ(plain: Sample) -> None:
    labels = np.zeros((7, 7), dtype=np.uint8)
    labels[1:6, 1:6] = 7
    layer = organ_layer(labels, plain.findings.organs)
    opacity = layer.palette[layer.index][..., 3]
    assert (opacity[2:5, 2:5] == 70).all()
    assert (opacity[1, 1:6] == 255).all()
    assert not opacity[0].any()
    assert tuple(layer.palette[layer.index[1, 1]][:3]) == ANATOMY["Mandible"].colour


def test_a_layer_as_png_blends_as_it_does_here(plain: Sample) -> None:
    picture = picture_of(plain.stack, plain.findings, 14)
    for layer in (picture.organs, picture.confidence, picture.experts):
        ours = layer.over(rgb_of(picture.grey)).astype(int)
        top = Image.open(BytesIO(layer.png())).convert("RGBA")
        bottom = Image.fromarray(rgb_of(picture.grey)).convert("RGBA")
        theirs = np.asarray(Image.alpha_composite(bottom, top).convert("RGB")).astype(int)
        assert np.abs(ours - theirs).max() <= 1


def test_experts_leave_air_alone_and_go_from_global_to_local(plain: Sample) -> None:
    picture = picture_of(plain.stack, plain.findings, 14)
    colours = picture.experts.palette[picture.experts.index]
    assert colours[0, 0, 3] == 0
    left, right = colours[24, 8].astype(int), colours[24, 48].astype(int)
    assert left[2] > left[0]  # global: blue
    assert right[0] > right[2]  # local: orange


def test_a_coronal_view_has_the_head_up_and_true_proportions(uneven: Sample) -> None:
    view = coronal_view(uneven.stack, uneven.findings, slice(None))
    assert view is not None
    assert view.is_coronal
    assert view.up == "H"
    assert view.heights[0] == 1.0  # the lowest slice is at the bottom
    np.testing.assert_allclose(np.diff(view.heights)[[0, -1]], [-4 / 106, -7 / 106], atol=1e-9)
    assert abs(len(view.grey) - 106 / 1.2) <= 1


def test_a_single_slice_has_no_coronal_view(plain: Sample) -> None:
    stack = replace(
        plain.stack,
        hu=plain.stack.hu[:1],
        origins_mm=plain.stack.origins_mm[:1],
        is_interpolated=plain.stack.is_interpolated[:1],
    )
    assert coronal_view(stack, plain.findings, slice(None)) is None


def test_a_montage_has_a_tile_for_each_slice(plain: Sample) -> None:
    sheet = montage_of(plain.stack, plain.findings, (3, 8, 11, 14))
    tile_height = round(384 * (48 * 1.6) / (56 * 1.2))
    assert sheet.shape == (2 * (tile_height + 24) + 48, 3 * 384, 3)
    image = Image.open(BytesIO(png_of(sheet)))
    assert image.size == (sheet.shape[1], sheet.shape[0])
