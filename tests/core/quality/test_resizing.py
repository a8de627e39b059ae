"""One function changes sizes: antialiased, rounded or not as each metric's reference does it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffoundry.quality.resizing import crop_centre, resize, resize_shorter_side
from tests.core.quality.weights import make_pictures


def test_the_same_size_is_left_alone() -> None:
    (picture,) = make_pictures(1, 0)
    assert np.array_equal(resize(picture, 64, 64, rounded=False), picture)


def test_rounded_is_what_pillow_makes_of_eight_bits() -> None:
    (picture,) = make_pictures(1, 1)
    wanted = np.asarray(Image.fromarray(picture).resize((40, 24), Image.Resampling.BICUBIC))
    found = resize(picture, 24, 40, rounded=True)
    assert found.dtype == np.float32 and np.array_equal(found, wanted)


def test_unrounded_lies_close_to_rounded() -> None:
    """Eight bits are rounded twice: after the rows, and after the columns."""
    (picture,) = make_pictures(1, 2)
    one, other = (resize(picture, 150, 150, rounded=r) for r in (False, True))
    assert 0 < np.abs(one - other).max() <= 1.5
    assert (one % 1 > 0).any() and one.min() >= 0 and one.max() <= 255


def test_shrinking_averages_instead_of_skipping() -> None:
    """Lines of one pixel become grey: without antialiasing they would stay or vanish."""
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    small = resize(lines, 16, 16, rounded=False)
    assert np.abs(small[:, 2:-2] - 127.5).max() < 4


def test_the_longer_side_follows_and_is_cut_in_the_middle() -> None:
    picture = np.zeros((64, 100, 3), np.uint8)
    picture[:, 40:60] = 200
    found = resize_shorter_side(picture, 32)
    assert found.shape == (32, 50, 3)
    middle = crop_centre(found, 32, 32)
    assert middle.shape == (32, 32, 3) and middle[16, 16, 0] == 200
    assert np.array_equal(middle, found[:, 9:41])
