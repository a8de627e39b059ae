"""Scenes: every one has an exact caption and is drawn wholly inside the picture."""

import numpy as np
import pytest

from diffoundry.embedded.scenes import PALETTE, Scene, all_scenes, caption, draw, parse


def test_every_scene_has_its_own_caption_that_parses_back() -> None:
    scenes = all_scenes()
    assert len(set(map(caption, scenes))) == len(scenes) == 8 * 7 * 6 * 2
    assert [parse(caption(scene)) for scene in scenes] == list(scenes)


def test_no_object_has_the_colour_of_its_background() -> None:
    assert all(scene.colour != scene.background for scene in all_scenes())


def test_the_caption_reads_as_the_design_shows_it() -> None:
    assert caption(Scene("red", "circle", "small", "blue")) == (
        "a small red circle on a blue background"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a small red circle on a red background",
        "a small red circle on a blue background.",
        "a red small circle on a blue background",
        "the small red circle on a blue background",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a scene's caption"):
        parse(text)


def test_drawing_is_decided_by_the_seed() -> None:
    scene = all_scenes()[100]
    first, again, other = (draw(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_object_is_wholly_inside_and_of_its_colour() -> None:
    rng = np.random.default_rng(3)
    for scene in all_scenes():
        picture = draw(scene, rng)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        back = np.array(PALETTE[scene.background])
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (frame == back).all(), scene
        assert (picture == PALETTE[scene.colour]).all(-1).sum() > 80, scene


def test_a_large_object_covers_twice_a_small_one() -> None:
    rng = np.random.default_rng(4)

    def area(scene: Scene) -> int:
        return int((draw(scene, rng) != PALETTE[scene.background]).any(-1).sum())

    for large in (scene for scene in all_scenes() if scene.size == "large"):
        small = Scene(large.colour, large.shape, "small", large.background)
        assert area(large) > 2 * area(small)
