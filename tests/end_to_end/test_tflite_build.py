"""A bundle of TFLite engines through the commands: build, verify, generate at each listed size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffoundry.errors import ExitCode
from diffoundry.formats import tflite
from tests.end_to_end.commands import files_of, run, run_json
from tests.mini_pipelines import make_named

Built = tuple[Path, Any]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Built:
    """(bundle of a small LCM of 16 × 16 pixels, the build's JSON document)."""
    folder = tmp_path_factory.mktemp("tflite")
    model = make_named(folder / "lcm", "lcm")
    out = folder / "bundle"
    code, document = run_json(cache, "build", model, "--profile", "tflite-android", "--out", out)
    assert code == ExitCode.DONE, document
    return out, document


def lines(document: Any, level: str) -> list[Any]:
    parity = document["bundle"]["variants"][0]["parity"]
    return [check for result in parity for check in result["checks"] if check["level"] == level]


def assert_the_bars(document: Any) -> None:
    calls = lines(document, "call")
    assert {check["component"] for check in calls} == {
        "text_encoder", "unet", "vae_encoder", "vae_decoder",
    }  # fmt: skip
    shapes = [check for check in lines(document, "shape_range") if check["measure"]]
    for check in [*calls, *shapes]:
        assert check["measure"]["max_abs"] <= 1e-4, check
    refusals = [check["name"] for check in lines(document, "shape_range") if not check["measure"]]
    assert refusals and all(name.startswith("refuses ") for name in refusals)
    pictures = next(check for check in lines(document, "image") if check["name"] == "pictures")
    assert pictures["values"]["worst_psnr_db"] >= 50


def test_every_component_meets_the_bars_at_every_listed_shape(built: Built) -> None:
    assert_the_bars(built[1])


def test_engines_have_a_signature_for_each_shape_and_int32_ids(built: Built) -> None:
    engines = built[0] / "engines" / "tflite-android-fp32"
    names = [one.name for one in tflite.read_signatures(engines / "unet")]
    assert names == ["b1_h16_w16", "b1_h24_w16"]
    (text,) = tflite.read_signatures(engines / "text_encoder")
    assert text.name == "b1" and text.inputs["input_ids"].dtype == "int32"


def test_verify_passes_without_pytorch_and_notices_a_truncated_engine(
    built: Built, cache: Path
) -> None:
    code, text = run(cache, "verify", built[0])
    assert code == ExitCode.DONE and "verify: passed" in text
    assert "XNNPACK" not in text, "LiteRT's own notice reached the terminal"
    file = built[0] / "engines" / "tflite-android-fp32" / "vae_decoder" / tflite.MODEL_FILE
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-100])
        code, text = run(cache, "verify", built[0])
    finally:
        file.write_bytes(whole)
    assert code == ExitCode.FAILED and "vae_decoder" in text


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 16)])
def test_pictures_are_made_at_each_listed_size(
    built: Built, cache: Path, tmp_path: Path, height: int, width: int
) -> None:
    size = ("--height", height, "--width", width)
    code, text = run(cache, "generate", built[0], "a red circle", "--out", tmp_path, *size)
    assert code == ExitCode.DONE, text
    (picture,) = tmp_path.glob("*.png")
    assert np.asarray(Image.open(picture)).shape == (height, width, 3)


def test_a_size_that_is_not_listed_is_refused_with_those_that_are(
    built: Built, cache: Path, tmp_path: Path
) -> None:
    size = ("--height", 16, "--width", 24)
    code, text = run(cache, "generate", built[0], "a red circle", "--out", tmp_path, *size)
    assert code == ExitCode.USAGE and "16 × 16; 24 × 16" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_embedded_model_meets_the_bars_and_builds_byte_for_byte_again(tmp_path: Path) -> None:
    bundles = []
    for name in ("one", "two"):
        out = tmp_path / name / "bundle"
        code, document = run_json(
            tmp_path / name / "cache", "build", "--profile", "tflite-android", "--out", out
        )
        assert code == ExitCode.DONE, json.dumps(document)[:2000]
        assert_the_bars(document)
        bundles.append(files_of(out))
    assert bundles[0] == bundles[1]
