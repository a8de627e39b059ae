"""`diffoundry generate`: pictures from a bundle's engines alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.manifest import Power
from diffoundry.artifacts.store import default_root
from diffoundry.choosing import (
    choose_variant,
    refuse_changed_files,
    text_to_image,
    too_large_together,
    variant_on_demand,
)
from diffoundry.cli.console import console, print_json
from diffoundry.cli.preview import preview_of
from diffoundry.errors import ExitCode, UsageError
from diffoundry.generation import Picture, save_png
from diffoundry.sampling.requests import latent_shape
from diffoundry.sampling.tiling import Tiling


def run_generate(
    *,
    bundle_path: Path,
    prompts: Sequence[str],
    negative: str,
    steps: int | None,
    guidance: float | None,
    scheduler: str | None,
    seed: int,
    count: int,
    height: int | None,
    width: int | None,
    variant: str | None,
    power: Power | None,
    tile: str,
    preview: bool,
    preview_from: Path | None,
    out: Path,
    as_json: bool,
) -> ExitCode:
    """Make the pictures, writing each as soon as it is there. Raises DiffoundryError."""
    digests = default_root() / "digests.sqlite"
    bundle = open_bundle(bundle_path, HashCache(digests))
    choice = choose_variant(bundle, variant, power)
    sampling = bundle.manifest.sampling
    refuse_changed_files(bundle)
    tiling = parse_tile(tile)
    sessions = variant_on_demand(bundle, choice.variant, by_stand_in=choice.by_stand_in)
    pipeline = text_to_image(bundle, sessions)
    small = preview_of(pipeline, bundle, choice, preview, preview_from, digests)
    pipeline = pipeline if small is None else small.pipeline
    geometry = pipeline.geometry
    shape = latent_shape(geometry, sessions["unet"], height, width)
    tiles = pipeline.tiles(shape, tiling)
    in_turn = len(prompts) * count > 1 and too_large_together(bundle, choice.variant)
    _make_folder(out)
    files: list[dict[str, object]] = []
    notes = console(stderr=as_json)
    notes.print(f"variant {choice.variant.name}: {choice.why}", highlight=False)
    if small is not None:
        notes.print(small.told(), highlight=False)
    if tiles is not None:
        cut = tiles.described(geometry.vae_factor)
        notes.print(f"decoded in {cut}: {tiles.why}", highlight=False)
    if in_turn:
        notes.print("little memory: pictures come at the end, when the U-Net is done with all")

    def save(picture: Picture) -> None:
        if small is not None:
            picture = small.label(picture)
        path = out / file_name(picture)
        save_png(picture, path, bundle.digest)
        files.append({"file": str(path), **picture.parameters, "lost": picture.lost})
        notes.print(str(path), highlight=False, markup=False)

    pictures = pipeline.generate(
        list(prompts),
        negative,
        steps=steps or (sampling.steps if scheduler in (None, sampling.scheduler) else None),
        guidance=sampling.guidance if guidance is None else guidance,
        scheduler=scheduler or sampling.scheduler,
        seed=seed,
        count=count,
        height=height,
        width=width,
        tile=tiling,
        in_turn=in_turn,
        done=save,
    )
    for lost in dict.fromkeys(text for p in pictures for text in (p.lost, p.lost_negative) if text):
        notes.print(f"warning: too long for the model, not seen: {lost!r}", style="yellow")
    if as_json:
        document = {"variant": choice.variant.name, "bundle": bundle.digest, "pictures": files}
        told = {"power": choice.variant.power, "by_stand_in": choice.by_stand_in}
        print_json({**document, **told, "why": choice.why, "in_turn": in_turn})
    return ExitCode.DONE


def parse_tile(text: str) -> Tiling:
    """What `--tile` says. Raises UsageError."""
    if text in ("auto", "off"):
        return "auto" if text == "auto" else "off"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(
        "--tile",
        expected="auto, off, or the longest side of a tile in pixels",
        found=text,
        remedy="leave it to auto",
    )


def file_name(picture: Picture) -> str:
    """ "a-small-red-circle-seed7.png": what a person looks for in the folder.

    A prompt that the name cannot hold (long, another script) gets a mark of its own, so that no
    picture takes the place of another prompt's.
    """
    prompt = str(picture.parameters["prompt"])
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    short = words[:60].strip("-")
    if short.replace("-", " ") != prompt.lower():
        mark = hashlib.sha256(prompt.encode()).hexdigest()[:6]
        short = f"{short}-{mark}" if short else mark
    kind = "-preview" if "preview" in picture.parameters else ""
    return f"{short}-seed{picture.seed}{kind}.png"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            "--out",
            expected="a folder that can be written",
            found=f"{out}: {error.strerror}",
            remedy="choose another folder",
        ) from error
