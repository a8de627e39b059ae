"""generate: file names that a person recognises and that no two prompts share; `--power`."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.cli.generate import file_name
from diffoundry.cli.main import main
from diffoundry.errors import ExitCode
from diffoundry.generation import Picture
from tests.artifacts.working_bundle import working_content

LONG = "a very long story about " + "many " * 20


def name(prompt: str, seed: int = 7) -> str:
    return file_name(Picture(np.zeros((1, 1, 3), np.uint8), seed, {"prompt": prompt}))


def test_a_plain_prompt_is_the_name():
    assert name("a small red circle") == "a-small-red-circle-seed7.png"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG + "foxes", LONG + "geese"),
        ("\u7ea2\u8272", "\u84dd\u8272"),
        ("a, b", "a b"),
        ("", "!"),
    ],
)
def test_two_prompts_never_share_a_file(one, other):
    assert name(one) != name(other)
    assert name(one) != name(one, seed=8)
    assert len(name(one)) < 100 and "/" not in name(one)


@pytest.fixture
def generate(tmp_path, monkeypatch, capsys):
    """generate(…) -> (exit code, output) over a bundle of a plain variant and one of low power."""
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
    content = working_content(tmp_path / "parts")
    (full,) = content.variants
    low = dataclasses.replace(full, name="narrow", power="low")
    write_bundle(tmp_path / "bundle", dataclasses.replace(content, variants=(full, low)))

    def call(*arguments):
        command = ["generate", str(tmp_path / "bundle"), "a cat", "--out", str(tmp_path / "p")]
        monkeypatch.setattr(sys, "argv", ["diffoundry", *command, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), capsys.readouterr()

    return call


def test_power_chooses_the_variant_and_the_choice_is_printed(generate):
    code, printed = generate("--power", "low")
    assert code == ExitCode.DONE
    assert "variant narrow: the first of power low whose runtime (onnx_session)" in printed.out
    code, printed = generate("--power", "low", "--json")
    document = json.loads(printed.out)
    assert (document["variant"], document["power"]) == ("narrow", "low")


def test_a_power_that_the_bundle_lacks_is_refused_with_those_there_are(generate):
    code, printed = generate("--power", "balanced")
    assert code == ExitCode.FAILED and "narrow (low)" in printed.err
    assert generate("--power", "much")[0] == ExitCode.USAGE
    assert generate("--power", "low", "--variant", "narrow")[0] == ExitCode.USAGE


@pytest.mark.parametrize("tile", ["12x12", "0", "-64", ""])
def test_a_tile_size_that_is_none_is_refused(generate, tile):
    code, printed = generate("--tile", tile)
    assert code == ExitCode.USAGE and "auto, off" in printed.err


def test_tiles_are_announced_and_stand_in_the_picture(generate, tmp_path):
    from PIL import Image

    code, printed = generate("--tile", "16", "--height", "32", "--width", "24")
    assert code == ExitCode.DONE, printed.err
    assert "tiles of" in printed.out
    (file,) = (tmp_path / "p").glob("*.png")
    with Image.open(file) as png:
        assert "tiles of" in json.loads(png.text["parameters"])["tiles"]


def preview_parameters(tmp_path):
    from PIL import Image

    (file,) = (tmp_path / "p").glob("*.png")
    assert file.name.endswith("-preview.png")
    with Image.open(file) as png:
        return json.loads(png.text["parameters"])


def test_a_preview_is_measured_and_labelled(generate, tmp_path):
    # Lent by the very same bundle, the decoder is the one that the golden pictures came from.
    code, printed = generate("--preview-from", str(tmp_path / "bundle"))
    assert code == ExitCode.DONE, printed.err
    assert "preview: decoded by another model" in printed.out
    assert preview_parameters(tmp_path)["preview"]["psnr_db"] > 100


def test_a_preview_takes_latents_as_its_own_model_scales_them(generate, tmp_path):
    content = working_content(tmp_path / "other")
    geometry = dataclasses.replace(content.model.geometry, latent_scaling_factor=100.0)
    model = content.model.model_copy(update={"geometry": geometry})
    write_bundle(tmp_path / "small", dataclasses.replace(content, model=model))
    code, printed = generate("--preview-from", str(tmp_path / "small"))
    assert code == ExitCode.DONE, printed.err
    assert preview_parameters(tmp_path)["preview"]["psnr_db"] < 60


def test_a_decoder_of_other_latents_is_refused(generate, tmp_path):
    content = working_content(tmp_path / "other")
    geometry = dataclasses.replace(content.model.geometry, vae_factor=2)
    model = content.model.model_copy(update={"geometry": geometry})
    write_bundle(tmp_path / "small", dataclasses.replace(content, model=model))
    code, printed = generate("--preview-from", str(tmp_path / "small"))
    assert code == ExitCode.USAGE and "× 2" in printed.err


def with_preview_decoder(content):
    """The content with the decoder's engine once more, as a preview decoder."""
    (variant,) = content.variants
    engines = {**variant.engines, "preview_decoder": variant.engines["vae_decoder"]}
    contract = dataclasses.replace(content.contracts["vae_decoder"], component="preview_decoder")
    return dataclasses.replace(
        content,
        variants=(dataclasses.replace(variant, engines=engines),),
        contracts={**content.contracts, "preview_decoder": contract},
        golden={**content.golden, "preview_decoder": content.golden["vae_decoder"]},
    )


def test_a_bundles_own_preview_decoder_takes_latents_as_they_are(generate, tmp_path):
    write_bundle(tmp_path / "bundle", with_preview_decoder(working_content(tmp_path / "own")))
    code, printed = generate("--preview")
    assert code == ExitCode.DONE, printed.err
    assert "preview: decoded by the bundle's preview decoder" in printed.out
    found = preview_parameters(tmp_path)["preview"]
    # Not divided by the model's scaling factor, so that the same network gives another picture.
    assert found["psnr_db"] < 60
    assert found["bundle"] == open_bundle(tmp_path / "bundle").digest


def test_a_lenders_preview_decoder_comes_before_its_full_one(generate, tmp_path):
    lender = write_bundle(
        tmp_path / "small", with_preview_decoder(working_content(tmp_path / "own"))
    ).bundle
    code, printed = generate("--preview-from", str(tmp_path / "small"))
    assert code == ExitCode.DONE and "decoded by another model" in printed.out
    found = preview_parameters(tmp_path)["preview"]
    assert found["psnr_db"] < 60 and found["bundle"] == lender.digest


def test_a_bundle_without_a_preview_decoder_says_how_to_get_one(generate):
    code, printed = generate("--preview")
    assert code == ExitCode.USAGE and "--preview-vae DIR" in printed.err
    assert "--preview-from BUNDLE" in printed.err


def test_one_preview_decoder_at_a_time(generate, tmp_path):
    code, printed = generate("--preview", "--preview-from", str(tmp_path / "bundle"))
    assert code == ExitCode.USAGE and "one of the two" in printed.err
