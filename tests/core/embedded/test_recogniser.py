"""The recogniser reads what was drawn and abstains from everything else."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks import judge
from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import PALETTE, Scene, all_scenes, draw


def drawn_scenes(count: int, seed: int) -> Iterator[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    scenes = all_scenes()
    for i in rng.integers(0, len(scenes), size=count):
        yield scenes[i], draw(scenes[i], rng)


def soften(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def test_fresh_drawings_are_read_right() -> None:
    wrong = [scene for scene, picture in drawn_scenes(600, 1) if recognise(picture) != scene]
    assert len(wrong) <= 3


def test_floating_point_pictures_are_read_like_integer_ones() -> None:
    for scene, picture in drawn_scenes(20, 2):
        assert recognise(picture.astype(np.float64) / 255) == scene
        assert recognise(picture.astype(np.float16) / np.float16(255)) == scene


def test_soft_and_slightly_noisy_pictures_are_still_read() -> None:
    rng = np.random.default_rng(3)
    right = 0
    for scene, picture in drawn_scenes(300, 3):
        noisy = soften(picture, 0.7) + rng.normal(0, 5, picture.shape)
        right += recognise(np.clip(noisy, 0, 255).astype(np.uint8)) == scene
    assert right >= 0.98 * 300


def test_noise_is_unreadable() -> None:
    rng = np.random.default_rng(4)
    uniform = (rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(150))
    # Smooth noise in palette-like colours, closer to what a broken network paints.
    coarse = rng.integers(0, 256, (150, 8, 8, 3)).astype(np.uint8)
    smooth = (np.asarray(Image.fromarray(small).resize((64, 64))) for small in coarse)
    read = [scene for scene in map(recognise, [*uniform, *smooth]) if scene is not None]
    assert len(read) <= 3


@pytest.mark.parametrize("colour", list(PALETTE))
def test_a_blank_is_unreadable(colour: str) -> None:
    assert recognise(np.full((64, 64, 3), PALETTE[colour], dtype=np.uint8)) is None


def test_the_average_of_two_scenes_is_unreadable() -> None:
    pairs = list(zip(drawn_scenes(400, 5), drawn_scenes(400, 6), strict=True))
    mixed = [(one.astype(np.uint16) + other) // 2 for (a, one), (b, other) in pairs if a != b]
    read = [scene for m in mixed if (scene := recognise(m.astype(np.uint8))) is not None]
    assert len(read) <= 0.01 * len(mixed)


def test_two_scenes_on_one_background_averaged_are_unreadable() -> None:
    rng = np.random.default_rng(7)
    scenes = [scene for scene in all_scenes() if scene.background == "white"]
    read = tried = 0
    for _ in range(300):
        a, b = (scenes[i] for i in rng.integers(0, len(scenes), size=2))
        if a == b:
            continue
        mixed = (draw(a, rng).astype(np.uint16) + draw(b, rng)) // 2
        read += recognise(mixed.astype(np.uint8)) is not None
        tried += 1
    assert read <= 0.01 * tried


def test_two_objects_in_one_picture_are_unreadable() -> None:
    base = draw(Scene("red", "circle", "large", "white"), np.random.default_rng(8))
    base[:, 2:10] = PALETTE["blue"]
    assert recognise(base) is None


@pytest.mark.parametrize("share", [0.25, 0.3, 0.5])
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_a_part_of_an_object_is_unreadable(shape: str, share: float) -> None:
    """Three quarters of a small circle fit a smaller circle about as well as a blurred one does."""
    rng = np.random.default_rng(9)
    for _ in range(10):
        picture = draw(Scene("red", shape, "small", "cyan"), rng)
        rows = np.flatnonzero((picture != PALETTE["cyan"]).any((1, 2)))
        picture[: rows[0] + round(share * len(rows))] = PALETTE["cyan"]
        assert recognise(picture) is None


@pytest.mark.parametrize("kind", list(judge.SCENES))
def test_the_bench_of_the_judge_reads_its_scenes(kind: str) -> None:
    """The whole bench, with 3,000 of each: benchmarks/judge.py, figures in docs/quality.md."""
    assert judge.measure_scenes(kind, 80, seed=1).share >= 0.98


@pytest.mark.parametrize("kind", list(judge.OTHERS))
def test_the_bench_of_the_judge_reads_nothing_else(kind: str) -> None:
    assert judge.measure_others(kind, 80, seed=1).share >= 0.98


@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 64), (1, 64, 64, 3), (3, 64, 64)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a picture"):
        recognise(np.zeros(shape, dtype=np.uint8))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="got int64"):
        recognise(np.zeros((64, 64, 3), dtype=np.int64))
