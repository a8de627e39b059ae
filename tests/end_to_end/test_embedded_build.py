"""The whole chain on the embedded model: the bars, the second run, the bundle's own commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffoundry.errors import ExitCode
from diffoundry.formats.canonical import pretty_json, sha256_file
from diffoundry.profiles.reading import shipped_profiles
from tests.end_to_end.commands import COMMAND, environment, run, run_json
from tests.mini_pipelines import make_named

FULL_CHAIN = {"capture", "check_component", "check_pipeline", "onnx_from_exported_program"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory, cache):
    """(bundle folder, the build's JSON document)."""
    out = tmp_path_factory.mktemp("out") / "bundle"
    code, document = run_json(cache, "build", "--out", out)
    assert code == ExitCode.DONE, document
    return out, document


def checks(document, level):
    parity = document["bundle"]["variants"][0]["parity"]
    return [check for result in parity for check in result["checks"] if check["level"] == level]


def test_fp32_engines_meet_the_bars(built):
    _, document = built
    assert {stage["stage"] for stage in document["stages"]} >= FULL_CHAIN
    calls = checks(document, "call")
    assert {check["component"] for check in calls} == {
        "text_encoder", "unet", "vae_encoder", "vae_decoder",
    }  # fmt: skip
    for check in calls:
        assert check["measure"]["max_abs"] <= 1e-4, check
        assert check["measure"]["cosine"] >= 0.99999, check
    (trajectory,) = checks(document, "trajectory")
    assert trajectory["measure"]["max_abs"] <= 1e-3
    pictures = next(check for check in checks(document, "image") if check["name"] == "pictures")
    assert pictures["values"]["worst_psnr_db"] >= 50


def test_each_process_stays_small(built):
    _, document = built
    assert max(stage["peak_memory_bytes"] for stage in document["stages"]) < 2e9


def test_the_same_build_again_runs_nothing(built, cache):
    out, _ = built
    code, document = run_json(cache, "build", "--out", out)
    assert code == ExitCode.DONE
    assert {stage["status"] for stage in document["stages"]} == {"hit"}
    assert document["bundle"]["changed"] is False


def test_a_changed_unet_option_runs_only_what_depends_on_it(built, cache, tmp_path):
    text = shipped_profiles()["onnx-cpu"].read_text() + (
        "\n[variants.component_routes]\nunet = [\n"
        '    { stage = "exported_program_from_torch" },\n'
        '    { stage = "onnx_from_exported_program", opset = 19 },\n]\n'
    )
    (tmp_path / "changed.toml").write_text(text)
    code, document = run_json(
        cache, "build", "--profile", tmp_path / "changed.toml", "--out", tmp_path / "bundle"
    )
    assert code == ExitCode.DONE
    made = {(s["component"], s["stage"]) for s in document["stages"] if s["status"] == "done"}
    assert made == {
        ("unet", "onnx_from_exported_program"),
        ("unet", "check_component"),
        (None, "check_pipeline"),
    }


def test_generate_draws_the_same_picture_as_the_reference_without_torch(built, tmp_path):
    """The interpreter has torch; the command must not import it."""
    out, _ = built
    prompt = "a large red circle on a white background"
    arguments = ["generate", str(out), prompt, "--seed", "5", "--out", str(tmp_path / "pictures")]
    code = (
        "import sys\n"
        "from diffoundry.cli.main import main\n"
        f"sys.argv = ['diffoundry', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n"
        "    bad = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "pictures").glob("*.png")
    with Image.open(file) as picture:
        parameters = json.loads(picture.text["parameters"])
        assert picture.text["bundle"] == sha256_file(out / "manifest.json")
        pixels = np.asarray(picture)
    assert parameters["prompt"] == prompt and parameters["seed"] == 5
    assert pixels.shape == (64, 64, 3) and pixels.std() > 20


def test_generate_refuses_a_step_count_without_a_table(built, tmp_path, cache):
    out, _ = built
    code, text = run(cache, "generate", out, "a circle", "--steps", 9, "--out", tmp_path / "p")
    assert code == ExitCode.USAGE and "1" in text and "8" in text


def test_generate_refuses_a_size_the_engines_were_not_built_for(built, tmp_path, cache):
    out, _ = built
    code, text = run(cache, "generate", out, "a circle", "--height", 512, "--out", tmp_path / "p")
    assert code == ExitCode.USAGE and "height 32 to 128" in text, text


def test_verify_passes_and_writes_junit(built, cache, tmp_path):
    out, _ = built
    code, text = run(cache, "verify", out, "--junit", tmp_path / "junit.xml")
    assert code == ExitCode.DONE, text
    assert "<testsuite" in (tmp_path / "junit.xml").read_text()


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "copy"))


def test_one_flipped_byte_is_found(copy, cache):
    engine = next(copy.glob("engines/*/unet/model.onnx"))
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    code, text = run(cache, "verify", copy)
    assert code == ExitCode.FAILED and "unet/model.onnx" in text
    code, text = run(cache, "generate", copy, "a circle", "--out", copy.parent / "pictures")
    assert code == ExitCode.FAILED and not list((copy.parent / "pictures").glob("*.png"))


def test_an_engine_of_another_model_fails_parity_even_with_its_digest_in_the_manifest(
    copy, cache, tmp_path
):
    """The decoder is exchanged for the encoder-sized stranger and the manifest made to agree."""
    manifest = json.loads((copy / "manifest.json").read_text())
    (variant,) = manifest["variants"]
    engines = variant["engines"]
    stranger = copy / engines["vae_decoder"]["path"] / "model.onnx"
    _perturb_weights(stranger)
    record = manifest["files"][f"{engines['vae_decoder']['path']}/model.onnx"]
    record["digest"], record["size_bytes"] = sha256_file(stranger), stranger.stat().st_size
    from diffoundry.formats.canonical import canonical_json, sha256_bytes

    engines["vae_decoder"]["digest"] = sha256_bytes(
        canonical_json({"model.onnx": record["digest"]})
    )
    engines["vae_decoder"]["size_bytes"] = record["size_bytes"]
    (copy / "manifest.json").write_text(pretty_json(manifest))
    code, text = run(cache, "verify", copy)
    assert code == ExitCode.FAILED, text
    assert "vae_decoder" in text and "failed" in text


def _perturb_weights(path: Path) -> None:
    """Another model of the same shape: every large weight scaled by 1.2."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 1000:
            tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.2), tensor.name))
    onnx.save(model, path)


def test_a_link_in_a_bundle_is_refused(copy, cache, tmp_path):
    engine = next(copy.glob("engines/*/unet/model.onnx"))
    elsewhere = tmp_path / "elsewhere.onnx"
    shutil.move(engine, elsewhere)
    engine.symlink_to(elsewhere)
    code, text = run(cache, "verify", copy)
    assert code == ExitCode.FAILED and "link" in text


def test_a_failing_limit_is_not_published_and_the_old_bundle_stays(built, cache, tmp_path):
    before = sha256_file(built[0] / "manifest.json")
    text = shipped_profiles()["onnx-cpu"].read_text().replace("psnr_db = 50", "psnr_db = 250")
    (tmp_path / "strict.toml").write_text(text)
    code, text = run(cache, "build", "--profile", tmp_path / "strict.toml", "--out", built[0])
    assert code == ExitCode.FAILED and "not published" in text
    assert sha256_file(built[0] / "manifest.json") == before


def test_a_component_alone_is_checked_but_not_published(built, cache, tmp_path):
    code, text = run(cache, "build", "--component", "vae_decoder", "--out", tmp_path / "bundle")
    assert code == ExitCode.DONE and "nothing is published" in text
    assert not (tmp_path / "bundle").exists()


def test_an_sd_pipeline_builds_and_generates_with_guidance(tmp_path, cache):
    """Two calls a step, a negative prompt, v-prediction, another scheduler: not only LCM works."""
    model = make_named(tmp_path / "sd2", "sd2")
    code, text = run(cache, "build", model, "--out", tmp_path / "bundle")
    assert code == ExitCode.DONE, text
    code, text = run(
        cache, "generate", tmp_path / "bundle", "a red circle", "--negative", "blue",
        "--scheduler", "euler_ancestral", "--steps", 3, "--count", 2, "--out", tmp_path / "p",
    )  # fmt: skip
    assert code == ExitCode.DONE, text
    assert len(list((tmp_path / "p").glob("*.png"))) == 2
    done = subprocess.run(
        [*COMMAND, "generate", str(tmp_path / "bundle"), "x", "--scheduler", "lcm"],
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitCode.USAGE and "ddim" in done.stderr
