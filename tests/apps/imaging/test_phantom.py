"""Generated anatomy: seeded, complete, and on the right side."""

import numpy as np

from apps.imaging.phantom import PhantomShape, make_phantom
from apps.imaging.segmentation import ORGANS


def test_a_seed_gives_the_same_person_and_another_seed_another() -> None:
    one, labels = make_phantom(4)
    again, same = make_phantom(4)
    other, _ = make_phantom(5)
    np.testing.assert_array_equal(one.hu, again.hu)
    np.testing.assert_array_equal(labels, same)
    assert (one.hu != other.hu).mean() > 0.1


def test_every_organ_is_there_where_it_belongs() -> None:
    stack, labels = make_phantom(0)
    centres = {}
    for label, name in enumerate(ORGANS, start=1):
        k, j, i = (np.nonzero(labels == label)[axis].mean() for axis in range(3))
        centres[name] = (
            stack.origins_mm[0]
            + k * np.array([0, 0, 3.0])
            + j * stack.pixel_mm[0] * stack.column_axis
            + i * stack.pixel_mm[1] * stack.row_axis
        )
    left, posterior, superior = range(3)
    assert centres["RightParotid"][left] < -30 < 30 < centres["LeftParotid"][left]
    assert centres["Mandible"][posterior] < centres["SpinalCord"][posterior]
    assert centres["Brainstem"][superior] > centres["Larynx"][superior]
    assert centres["Larynx"][superior] > centres["Esophagus"][superior]
    assert stack.hu[labels == 1 + ORGANS.index("Mandible")].mean() > 500


def test_noise_is_what_was_asked_for() -> None:
    quiet, _ = make_phantom(1, PhantomShape(noise_hu=0.0))
    loud, _ = make_phantom(1, PhantomShape(noise_hu=25.0))
    difference = (loud.hu.astype(float) - quiet.hu)[quiet.hu > -500]
    assert 23 < difference.std() < 27
