"""Decoding in tiles: what is cut how, that nothing is lost at seams, and what an engine allows."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.errors import UsageError
from diffoundry.sampling.tiling import AUTO_SIDE_PIXELS, decode_tiles, fade, plan_tiles
from diffoundry.types import Axis, Contract, ShapePolicy

FACTOR = 8


class Decoder:
    """Enlarges eight times and blurs over three latent pixels, as a network does: zeros outside.

    Far from a cut its answer is that of the whole latent. Keeps the sizes that it was called with.
    """

    def __init__(self, contract: Contract | None = None, policy: ShapePolicy | None = None) -> None:
        self.contract, self.policy = contract, policy
        self.sizes: list[tuple[int, int]] = []

    def infer(self, feeds):
        latent = feeds["latent"]
        assert latent.flags.c_contiguous
        self.sizes.append((latent.shape[2] * FACTOR, latent.shape[3] * FACTOR))
        padded = np.pad(latent[:, :3], ((0, 0), (0, 0), (1, 1), (1, 1)))
        height, width = latent.shape[2:]
        nine = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        return {"image": (sum(nine) / 9).repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)}


def dynamic(least: int = 256, largest: int = 2048, step: int = 64) -> Decoder:
    axes = [Axis(n, least, least, largest, step) for n in ("height", "width")]
    return Decoder(Contract("vae_decoder", (), (), (Axis("batch", 1, 1, 4), *axes)), ShapePolicy())


def enumerated(*sizes: tuple[int, int], kind: str = "enumerated") -> Decoder:
    shapes = [(("batch", 1), ("height", h), ("width", w)) for h, w in sizes]
    sides = [side for size in sizes for side in size]
    axes = [Axis(n, min(sides), min(sides), max(sides), 64) for n in ("height", "width")]
    contract = Contract("vae_decoder", (), (), (Axis("batch", 1, 1, 1), *axes))
    return Decoder(contract, ShapePolicy(kind, tuple(shapes)))


def latent_of(height: int, width: int, batch: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, 4, height // FACTOR, width // FACTOR)).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (640, 640), (768, 512), (256, 1536)])
def test_what_auto_can_decode_at_once_is_not_cut(height, width):
    assert plan_tiles(dynamic(), latent_of(height, width).shape, FACTOR) is None


@pytest.mark.parametrize("tile", [512, 640, 4096])
def test_a_latent_that_fits_one_tile_is_not_cut(tile):
    assert plan_tiles(dynamic(), latent_of(512, 448).shape, FACTOR, tile) is None


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (832, 1344), (1088, 576), (2048, 960)])
@pytest.mark.parametrize("tile", ["auto", 320, 512, 700])
def test_tiles_have_one_size_that_the_engine_takes_and_cover_the_picture(height, width, tile):
    decoder, latent = dynamic(), latent_of(height, width)
    tiles = plan_tiles(decoder, latent.shape, FACTOR, tile)
    image = decode_tiles(decoder, latent, tiles)
    assert image.shape == (1, 3, height, width) and image.dtype == np.float32
    (size,) = set(decoder.sizes)
    longest = AUTO_SIDE_PIXELS if tile == "auto" else tile
    assert all(256 <= side <= longest and side % 64 == 0 for side in size)
    assert len(decoder.sizes) == len(tiles.tops) * len(tiles.lefts)
    assert tiles.tops[-1] + tiles.height == height // FACTOR
    assert tiles.lefts[-1] + tiles.width == width // FACTOR


@pytest.mark.parametrize(
    ("whole", "side", "starts"),
    [(20, 12, (0, 8)), (41, 16, (0, 12, 25)), (16, 16, (0,)), (20, 16, (0, 1, 4))],
)
def test_at_every_pixel_the_shares_of_all_tiles_are_one(whole, side, starts):
    shares = fade(starts, side, whole, FACTOR)
    total = np.zeros(whole * FACTOR)
    for share, start in zip(shares, starts, strict=True):
        total[start * FACTOR : (start + side) * FACTOR] += share
    assert np.allclose(total, 1.0, atol=1e-6)
    assert (shares >= 0).all()


def test_where_no_cut_is_near_tiles_give_what_the_whole_gives():
    decoder, latent = dynamic(), latent_of(1024, 896, batch=2)
    whole = decoder.infer({"latent": latent})["image"]
    tiles = plan_tiles(decoder, latent.shape, FACTOR)
    image = decode_tiles(decoder, latent, tiles)
    # The blur reaches one latent pixel, and a tile's share is small there.
    rest = np.abs(image - whole)
    seams = np.ones(1024, bool)
    for top in tiles.tops:
        for edge in (top, top + tiles.height):
            seams[max(0, edge - 1) * FACTOR : (edge + 1) * FACTOR] = False
    columns = np.ones(896, bool)
    for left in tiles.lefts:
        for edge in (left, left + tiles.width):
            columns[max(0, edge - 1) * FACTOR : (edge + 1) * FACTOR] = False
    assert rest[:, :, seams][:, :, :, columns].max() < 1e-5
    assert rest.max() < 0.2 * np.abs(whole).max()


def test_an_engine_of_listed_shapes_is_called_with_the_largest_that_fits():
    decoder = enumerated((512, 512), (640, 640), (1024, 512), (2048, 2048))
    latent = latent_of(1024, 1024)
    tiles = plan_tiles(decoder, latent.shape, FACTOR)
    decode_tiles(decoder, latent, tiles)
    assert set(decoder.sizes) == {(640, 640)}
    assert plan_tiles(decoder, latent_of(2048, 2048).shape, FACTOR, 512).width == 512 // FACTOR


def test_an_engine_of_one_shape_decodes_larger_pictures_in_it():
    decoder = enumerated((512, 512), kind="fixed")
    latent = latent_of(768, 512)
    tiles = plan_tiles(decoder, latent.shape, FACTOR)
    assert "not a shape of this decoder" in tiles.why
    assert decode_tiles(decoder, latent, tiles).shape == (1, 3, 768, 512)
    assert set(decoder.sizes) == {(512, 512)}


def test_what_no_tile_can_help_is_left_to_the_engine_to_refuse():
    assert plan_tiles(enumerated((512, 512)), latent_of(1024, 256).shape, FACTOR) is None
    assert plan_tiles(dynamic(), latent_of(1024, 1024).shape, FACTOR, "off") is None


@pytest.mark.parametrize(("decoder", "expected"), [
    (dynamic(), "256 to 2048 in steps of 64"),
    (enumerated((512, 512), (640, 512)), "512 × 512, 640 × 512"),
])  # fmt: skip
def test_a_tile_that_the_engine_cannot_have_is_refused_with_those_that_it_can(decoder, expected):
    with pytest.raises(UsageError, match=expected):
        plan_tiles(decoder, latent_of(1024, 1024).shape, FACTOR, 128)


def test_the_decision_is_said():
    tiles = plan_tiles(dynamic(), latent_of(1024, 1152).shape, FACTOR)
    assert tiles.described(FACTOR) == "2 × 2 tiles of 576 × 640"
    assert "1024 × 1152 pixels are more than 640 squared" in tiles.why
