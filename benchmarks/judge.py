"""Measures the recogniser of `shapes-lcm`: what it reads right, and what it refuses to read.

.venv/bin/python benchmarks/judge.py [--scenes 3000] [--others 1000] [--seed 0] [--json FILE]

Exits with 1 where a bar is missed: 99.5 % of scenes right, 99 % of everything else unreadable.
Each kind is drawn from a seed of its own, so a figure does not depend on which others were asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    RADII,
    SHAPES,
    SIDE,
    Scene,
    all_scenes,
    draw,
    shape_coverage,
)
from diffoundry.parity.paired import lower_bound, upper_bound

RIGHT_BAR = 0.995
UNREADABLE_BAR = 0.99
Rng = np.random.Generator


def pick(rng: Rng) -> Scene:
    return all_scenes()[rng.integers(len(all_scenes()))]


def uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


# Scenes: a picture and what it shows. -----------------------------------------------------------


def plain(rng: Rng) -> tuple[np.ndarray, Scene]:
    scene = pick(rng)
    return draw(scene, rng), scene


def noisy(rng: Rng) -> tuple[np.ndarray, Scene]:
    """Gaussian noise of up to 5 of 255: 34 dB, worse than the autoencoder's round trip."""
    picture, scene = plain(rng)
    return uint8(picture + rng.normal(0, rng.uniform(1, 5), picture.shape)), scene


def soft(rng: Rng) -> tuple[np.ndarray, Scene]:
    """Edges blurred by up to 0.7 pixels, as an autoencoder's are."""
    picture, scene = plain(rng)
    return blurred(picture, rng.uniform(0.3, 0.7)), scene


def soft_and_noisy(rng: Rng) -> tuple[np.ndarray, Scene]:
    picture, scene = soft(rng)
    return uint8(picture + rng.normal(0, rng.uniform(1, 5), picture.shape)), scene


# Everything else: no scene is in it. ------------------------------------------------------------


def white_noise(rng: Rng) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def smoothed_noise(rng: Rng) -> np.ndarray:
    """Noise on a grid of 2 to 16 points a side, interpolated: what a broken network paints."""
    points = int(rng.integers(2, 17))
    coarse = rng.integers(0, 256, (points, points, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def palette_noise(rng: Rng) -> np.ndarray:
    """Smoothed noise cut into two palette colours: blobs with the right colours."""
    points = int(rng.integers(3, 17))
    coarse = Image.fromarray(rng.random((points, points)).astype(np.float32))
    field = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    front, back = rng.permutation(np.array(list(PALETTE.values())))[:2]
    return np.where(field[..., None] > rng.uniform(0.4, 0.8), front, back).astype(np.uint8)


def blank(rng: Rng) -> np.ndarray:
    """One colour, a palette's or any, half of them with faint noise."""
    colours = list(PALETTE.values())
    any_colour = rng.integers(0, 256, 3)
    colour = colours[rng.integers(len(colours))] if rng.random() < 0.5 else any_colour
    sigma = rng.choice([0, rng.uniform(1, 8)])
    return uint8(np.asarray(colour) + rng.normal(0, sigma, (SIDE, SIDE, 3)))


def half_blend(rng: Rng) -> np.ndarray:
    """The average of two different scenes."""
    one, other = pick(rng), pick(rng)
    while other == one:
        other = pick(rng)
    return uint8((draw(one, rng).astype(float) + draw(other, rng)) / 2)


def half_blend_same_background(rng: Rng) -> np.ndarray:
    """The average of two different scenes with one background: only the object is uncertain."""
    one, other = pick(rng), pick(rng)
    while other == one or other.background != one.background:
        other = pick(rng)
    return uint8((draw(one, rng).astype(float) + draw(other, rng)) / 2)


def two_objects(rng: Rng) -> np.ndarray:
    """Two objects of any colour, each showing at least half of itself."""
    while True:
        back, one, other = (np.array(PALETTE[name], float) for name in _three_colours(rng))
        first, second = _anywhere(rng), _anywhere(rng)
        hidden = np.minimum(first, second).sum()
        if hidden > 0.5 * min(first.sum(), second.sum()):
            continue
        picture = back + first[..., None] * (one - back)
        return uint8(picture + second[..., None] * (other - picture))


def _three_colours(rng: Rng) -> tuple[str, str, str]:
    """A background and two other colours, which may be the same."""
    back = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    rest = [name for name in COLOURS if name != back]
    return back, rest[rng.integers(len(rest))], rest[rng.integers(len(rest))]


def _anywhere(rng: Rng) -> np.ndarray:
    radius = RADII["small"] if rng.random() < 0.75 else RADII["large"]
    x, y = rng.uniform(radius * 0.8, SIDE - radius * 0.8, 2)
    return shape_coverage(SHAPES[rng.integers(len(SHAPES))], float(x), float(y), radius)


def two_halves(rng: Rng) -> np.ndarray:
    """Half of one scene beside, or above, half of another."""
    one, other = pick(rng), pick(rng)
    while other == one:
        other = pick(rng)
    first, second = draw(one, rng), draw(other, rng)
    if rng.random() < 0.5:
        return np.concatenate([first[: SIDE // 2], second[SIDE // 2 :]])
    return np.concatenate([first[:, : SIDE // 2], second[:, SIDE // 2 :]], axis=1)


def one_half(rng: Rng) -> np.ndarray:
    """Half a scene; the other half is bare background."""
    scene = pick(rng)
    picture = np.rot90(draw(scene, rng), int(rng.integers(4))).copy()
    picture[SIDE // 2 :] = PALETTE[scene.background]
    return np.rot90(picture, int(rng.integers(4)))


def shuffled(rng: Rng) -> np.ndarray:
    """A scene's patches of 8 or 16 pixels in another order."""
    picture = draw(pick(rng), rng)
    side = int(rng.choice([8, 16]))
    count = SIDE // side
    patches = picture.reshape(count, side, count, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    while True:
        mixed = patches[rng.permutation(len(patches))]
        mixed = mixed.reshape(count, count, side, side, 3).swapaxes(1, 2).reshape(picture.shape)
        if (mixed != picture).any():
            return mixed


SCENES: Mapping[str, Callable[[Rng], tuple[np.ndarray, Scene]]] = {
    "plain": plain,
    "with noise": noisy,
    "softened": soft,
    "softened, with noise": soft_and_noisy,
}
OTHERS: Mapping[str, Callable[[Rng], np.ndarray]] = {
    "white noise": white_noise,
    "smoothed noise": smoothed_noise,
    "blobs of two palette colours": palette_noise,
    "blank": blank,
    "half-blend of two scenes": half_blend,
    "half-blend on one background": half_blend_same_background,
    "two objects": two_objects,
    "two halves of two scenes": two_halves,
    "half a scene": one_half,
    "shuffled patches": shuffled,
}


@dataclass(frozen=True)
class Figure:
    """Hits of `count` pictures; exact 95 % interval (Clopper & Pearson 1934); the bar."""

    kind: str
    wanted: str
    hits: int
    count: int
    bar: float

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def reached(self) -> bool:
        return self.share >= self.bar

    @property
    def interval(self) -> tuple[float, float]:
        return lower_bound(self.hits, self.count), upper_bound(self.hits, self.count)


def measure_scenes(kind: str, count: int, seed: int) -> Figure:
    rng = np.random.default_rng([seed, 1, list(SCENES).index(kind)])
    made = (SCENES[kind](rng) for _ in range(count))
    hits = sum(recognise(picture) == scene for picture, scene in made)
    return Figure(kind, "right", hits, count, RIGHT_BAR)


def measure_others(kind: str, count: int, seed: int) -> Figure:
    rng = np.random.default_rng([seed, 2, list(OTHERS).index(kind)])
    hits = sum(recognise(OTHERS[kind](rng)) is None for _ in range(count))
    return Figure(kind, "unreadable", hits, count, UNREADABLE_BAR)


def measure(scenes: int, others: int, seed: int) -> list[Figure]:
    return [
        *(measure_scenes(kind, scenes, seed) for kind in SCENES),
        *(measure_others(kind, others, seed) for kind in OTHERS),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--others", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    figures = measure(options.scenes, options.others, options.seed)
    table = Table("pictures", "wanted", "share", "95 %", "of", "bar", "reached")
    for one in figures:
        low, high = one.interval
        table.add_row(
            one.kind, one.wanted, f"{one.share:.2%}", f"{low:.2%}–{high:.2%}", str(one.count),
            f"{one.bar:.1%}", "yes" if one.reached else "NO",
        )  # fmt: skip
    Console(width=110).print(table)
    if options.json:
        document = [{**asdict(one), "share": one.share, "reached": one.reached} for one in figures]
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if all(one.reached for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
