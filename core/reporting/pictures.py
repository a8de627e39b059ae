"""Reference and engine pictures side by side: the engines run here, the reference is recorded."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.choosing import open_variant, runtime_problem, stand_in_note
from diffoundry.errors import DiffoundryError
from diffoundry.formats import recording
from diffoundry.formats.recording import Trajectory
from diffoundry.formats.step_table import open_tables
from diffoundry.generation import PICTURE_COMPONENTS, TextToImage
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.parity.playing import Played, play
from diffoundry.quality.differences import image_psnr_db, image_ssim
from diffoundry.types import Array

MOST_AMPLIFIED = 7
"""As a power of ten: what float32 still tells apart in 0..1."""
Say = Callable[[str], None]

# Black, violet, orange, pale yellow: brighter is always more, in print and to any eye.
STOPS = (0.0, 0.35, 0.7, 1.0)
COLOURS = ((6, 6, 16), (104, 28, 129), (241, 128, 52), (253, 250, 200))


@dataclass(frozen=True)
class EnginePicture:
    """What one variant made of one pair. `image` [H, W, 3] in 0..1, or None and `error`."""

    variant: str
    image: Array | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    largest: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Pair:
    """One judged prompt and seed: the recorded reference [H, W, 3] in 0..1, and the engines'."""

    recorded: Trajectory
    reference: Array
    engines: tuple[EnginePicture, ...]


@dataclass(frozen=True)
class Pictures:
    """All pairs; `absent` says, variant by variant, why its engines did not run here, and `lent`
    which stand-in ran them in their runtime's place."""

    pairs: tuple[Pair, ...]
    absent: Mapping[str, str]
    lent: Mapping[str, str] = field(default_factory=dict)

    def factor(self, variant: str) -> int:
        """The power of ten that makes the variant's usual differences plainly visible.

        It follows the median pair, so that one outlier does not darken all the others.
        """
        found = [e.largest for p in self.pairs for e in p.engines if e.variant == variant]
        known = [one for one in found if one]
        if not known:
            return 1
        power = math.ceil(math.log10(0.5 / float(np.median(known))))
        return int(10 ** min(MOST_AMPLIFIED, max(0, power)))


def make_pictures(bundle: Bundle, say: Say = lambda line: None) -> Pictures:
    """Play every recorded trajectory on every variant whose runtime is here. Raises
    ArtifactError for a damaged recording and BundleError where there is none."""
    recorded = recording.load_pipeline(bundle.golden("pipeline")).trajectories
    played: dict[str, list[Played]] = {}
    absent: dict[str, str] = {}
    lent: dict[str, str] = {}
    for variant in bundle.manifest.variants:
        problem = runtime_problem(variant)
        try:
            note = stand_in_note(bundle, variant)
            if note:
                lent[variant.name] = note
            elif problem is not None:
                raise problem
            say(f"{variant.name}: {len(recorded)} pictures")
            played[variant.name] = _play_all(bundle, variant, recorded)
        except DiffoundryError as error:
            absent[variant.name] = error.text()
    pairs = [
        Pair(one, picture, tuple(_compare(name, played[name][i], k) for name in played))
        for i, one in enumerate(recorded)
        for k, picture in enumerate(one.image)
    ]
    return Pictures(tuple(pairs), absent, lent)


def _play_all(
    bundle: Bundle, variant: VariantRecord, recorded: tuple[Trajectory, ...]
) -> list[Played]:
    # The report says by whom (`Pictures.lent`).
    sessions = open_variant(bundle, variant, PICTURE_COMPONENTS, by_stand_in=True)
    try:
        pipeline = TextToImage(
            sessions,
            Tokenizer.open(bundle.tokenizer),
            open_tables(bundle.step_tables),
            bundle.manifest.model.geometry,
        )
        return [play(pipeline, one) for one in recorded]
    finally:
        for session in sessions.values():
            session.close()


def _compare(variant: str, played: Played, item: int) -> EnginePicture:
    """Picture `item` of a batch beside its reference."""
    wanted = played.reference.image
    if played.image is None or played.image.shape != wanted.shape:
        return EnginePicture(variant, error=played.error or "the picture has another size")
    reference, image = wanted[item], played.image[item]
    if not np.isfinite(image).all():
        return EnginePicture(variant, error="the picture holds NaN or infinity")
    largest = float(np.abs(image - reference).max())
    try:
        similarity: float | None = image_ssim(reference, image)
    except DiffoundryError:  # too small for SSIM, or scikit-image is absent: PSNR stands
        similarity = None
    return EnginePicture(variant, image, image_psnr_db(reference, image), similarity, largest)


def difference_map(reference: Array, image: Array, factor: float) -> Array:
    """uint8 [H, W, 3]: each pixel's largest channel difference × `factor`, as a colour."""
    amount = np.abs(np.asarray(image, np.float64) - reference).max(axis=-1) * factor
    channels = [np.interp(amount, STOPS, [c[k] for c in COLOURS]) for k in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def data_uri(image: Array) -> str:
    """A picture [H, W, 3], uint8 or float in 0..1, as a PNG inside a data: address."""
    from PIL import Image

    if image.dtype != np.uint8:
        image = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
