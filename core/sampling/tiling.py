"""Decoding a latent in overlapping tiles, so that a large picture needs little memory.

The idea is that of `enable_vae_tiling` in diffusers (AutoencoderKL.tiled_decode, after the tiled
VAE of A. Barbero Jiménez's "Mixture of Diffusers"): decode parts that overlap, and cross-fade
where they do. Here all tiles of a picture have one size, which its engine must allow, and lie
evenly, so that the last ones end where the picture ends, whatever its size.

What a tile cannot know: group norms take their statistics, and the middle block's attention its
keys, from the tile alone. Only the decoder is tiled; how much that costs is measured in
docs/real-size-shapes.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from diffoundry.errors import UsageError
from diffoundry.types import Array

Tiling = Literal["auto", "off"] | int
"""When to tile: where the picture is large, never, or with tiles of at most so many pixels."""

AUTO_SIDE_PIXELS = 640
"""What "auto" decodes at once: pictures of up to this side squared, and tiles of up to this side.
No figure of the machine's memory: the same command has to make the same picture everywhere."""
OVERLAP = 1 / 8
"""Share of the longest allowed side of a tile that neighbours have in common at least."""


class Decoder(Protocol):
    """A session of a VAE decoder: latent [batch, C, h, w] -> image [batch, 3, h×f, w×f]."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Tiles:
    """How a picture is cut. Sizes and places are latent pixels.

    `tops` and `lefts` are where rows and columns of tiles begin; `why` says why the picture
    is cut at all.
    """

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    why: str = ""

    def described(self, factor: int) -> str:
        """ "2 × 3 tiles of 512 × 576" (pixels; `factor`: how many make one of the latent)."""
        sides = f"{self.height * factor} × {self.width * factor}"
        return f"{len(self.tops)} × {len(self.lefts)} tiles of {sides}"

    def places(self) -> Iterator[tuple[int, int]]:
        """(index of row, index of column), in reading order."""
        return ((row, column) for row in range(len(self.tops)) for column in range(len(self.lefts)))


def plan_tiles(
    decoder: Any, shape: Sequence[int], factor: int, tiling: Tiling = "auto"
) -> Tiles | None:
    """Where to cut a latent of `shape` [batch, C, h, w], or None to decode it as it is.

    `decoder` may have a contract and a shape policy (`CheckedSession` has); what it does not say is
    allowed. "auto" tiles pictures above AUTO_SIDE_PIXELS squared, and those that the engine does
    not take as they are. A latent that fits one tile is never cut. Raises UsageError for a number
    of pixels that no tile of this engine can have.
    """
    if tiling == "off":
        return None
    batch, height, width = shape[0], shape[2] * factor, shape[3] * factor
    allowed = _Allowed(decoder, batch, factor)
    whole = allowed(height, width)
    large = height * width > AUTO_SIDE_PIXELS**2
    if tiling == "auto" and whole and not large:
        return None
    longest = AUTO_SIDE_PIXELS if tiling == "auto" else tiling
    if whole and max(height, width) <= longest:
        return None
    found = allowed.best(height, width, longest)
    if found is None and tiling == "auto":
        return None  # as it is: a shape that the engine refuses is refused with its own words
    if found is None or (tiling != "auto" and max(found) > tiling):
        raise UsageError(
            "tile size",
            expected=f"a side that this decoder takes: {allowed.described(height, width)}",
            found=str(tiling),
            remedy="choose such a size, or leave it to auto",
        )
    if found == (height, width):
        return None
    overlap = max(1, math.ceil(min(max(found), longest) * OVERLAP / factor))
    sides = (found[0] // factor, found[1] // factor)
    tops, lefts = (_places(s, t, overlap) for s, t in zip(shape[2:], sides, strict=True))
    size = f"{height} × {width}"
    reason = (
        f"{size} pixels are not a shape of this decoder" if not whole
        else f"{size} pixels are more than {AUTO_SIDE_PIXELS} squared"
        if tiling == "auto" else "asked for"
    )  # fmt: skip
    return Tiles(*sides, tops, lefts, reason)


def decode_tiles(decoder: Decoder, latent: Array, tiles: Tiles) -> Array:
    """What the decoder makes of `latent` [batch, C, h, w], tile by tile: [batch, 3, H, W] float32.

    Neighbours fade into each other over all that they share. Leaving out what lies near a cut, and
    shorter fades, were no better (1.1 dB worse to 0.3 better on the embedded model).
    """
    import numpy as np

    image: Array | None = None
    down: Array = np.zeros(0)
    across: Array = np.zeros(0)
    for row, column in tiles.places():
        top, left = tiles.tops[row], tiles.lefts[column]
        part = latent[:, :, top : top + tiles.height, left : left + tiles.width]
        feeds = {"latent": np.ascontiguousarray(part)}
        made = decoder.infer(feeds)["image"]
        factor = made.shape[2] // tiles.height
        if image is None:
            sides = (latent.shape[2] * factor, latent.shape[3] * factor)
            image = np.zeros((*made.shape[:2], *sides), np.float32)
            down = fade(tiles.tops, tiles.height, latent.shape[2], factor)
            across = fade(tiles.lefts, tiles.width, latent.shape[3], factor)
        window = np.s_[
            :, :, top * factor : (top + tiles.height) * factor,
            left * factor : (left + tiles.width) * factor,
        ]  # fmt: skip
        image[window] += made * (down[row][:, None] * across[column][None, :])
    assert image is not None
    return image


def fade(starts: Sequence[int], side: int, whole: int, factor: int) -> Array:
    """Weights along one axis: float32 [tiles, side × factor], which add up to 1 at every pixel.

    starts, side, whole: latent pixels; factor: pixels of the picture in one of the latent.
    """
    import numpy as np

    raw = np.full((len(starts), whole * factor), 0.0)
    place = np.arange(side * factor) + 0.5
    for index, start in enumerate(starts):
        before = starts[index - 1] + side - start if index else 0
        after = start + side - starts[index + 1] if index + 1 < len(starts) else 0
        weight = np.ones(side * factor)
        for shared, distance in ((before, place), (after, place[::-1])):
            if shared:
                weight = np.minimum(weight, distance / (shared * factor))
        raw[index, start * factor : (start + side) * factor] = weight
    raw /= raw.sum(axis=0)
    cut = [raw[i, s * factor : (s + side) * factor] for i, s in enumerate(starts)]
    return np.stack(cut).astype(np.float32)


def _places(whole: int, side: int, overlap: int) -> tuple[int, ...]:
    """Where tiles of `side` begin that share at least `overlap`, evenly, the last at the end."""
    if side >= whole:
        return (0,)
    count = math.ceil((whole - overlap) / max(1, side - overlap))
    return tuple(round(i * (whole - side) / (count - 1)) for i in range(count))


class _Allowed:
    """Which sizes a decoder's session takes, in pixels."""

    def __init__(self, decoder: Any, batch: int, factor: int) -> None:
        self._batch, self._factor = batch, factor
        contract = getattr(decoder, "contract", None)
        self._axes = {axis.name: axis for axis in contract.axes} if contract is not None else {}
        self._policy = getattr(decoder, "policy", None)

    def __call__(self, height: int, width: int) -> bool:
        shape = {"batch": self._batch, "height": height, "width": width}
        if any(self._axes[n].problem_with(v) for n, v in shape.items() if n in self._axes):
            return False
        return self._policy is None or bool(self._policy.allows(shape))

    def best(self, height: int, width: int, longest: int) -> tuple[int, int] | None:
        """The size of tile for a picture: as few as sides of up to `longest` pixels make possible,
        and then as small as they can be. Where only larger ones are allowed, the smallest of those.
        """
        if self._policy is not None and self._policy.kind != "dynamic":
            sizes = {
                (dict(s).get("height", 0), dict(s).get("width", 0)) for s in self._policy.shapes
            }
            fitting = [s for s in sizes if s[0] <= height and s[1] <= width and self(*s)]
            small = [size for size in fitting if max(size) <= longest]
            # (area, size): the same one every time
            chosen = max(small, key=lambda s: (s[0] * s[1], s), default=None)
            return chosen or min(fitting, key=lambda s: (s[0] * s[1], s), default=None)
        sides = [self._side("height", height, longest), self._side("width", width, longest)]
        return (sides[0], sides[1]) if all(sides) and self(sides[0], sides[1]) else None

    def _side(self, name: str, whole: int, longest: int) -> int:
        """One side of a tile in pixels; 0 where none is allowed."""
        axis = self._axes.get(name)
        step = math.lcm(axis.multiple_of if axis else 1, self._factor)
        longest = min(longest, axis.max) if axis else longest
        longest -= longest % step
        if whole <= longest:
            return whole
        least = max(axis.min if axis else 0, step)
        if longest < least:
            return 0
        overlap = math.ceil(longest * OVERLAP)
        count = math.ceil((whole - overlap) / (longest - overlap))
        side = math.ceil((whole + (count - 1) * overlap) / count / step) * step
        return min(max(side, least), longest)

    def described(self, height: int, width: int) -> str:
        """The sizes there are, for a person."""
        if self._policy is not None and self._policy.kind != "dynamic":
            sizes = sorted(
                {(dict(s).get("height", 0), dict(s).get("width", 0)) for s in self._policy.shapes}
            )
            return ", ".join(f"{one} × {other}" for one, other in sizes)
        axes = [self._axes[name] for name in ("height", "width") if name in self._axes]
        limits = [f"{a.min} to {a.max} in steps of {a.multiple_of}" for a in axes]
        return ", ".join(dict.fromkeys(limits)) or f"{self._factor} or more"
