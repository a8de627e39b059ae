"""Bundles as they are opened: read whole, and never trusted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.errors import BundleError, UsageError
from diffoundry.formats.canonical import sha256_file, tree_digest
from tests.artifacts.tiny_bundle import (
    CONTRACTS,
    contents,
    write_files,
)

pytestmark = pytest.mark.usefixtures("cache")


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((out / "manifest.json").read_text())
    change(data)
    (out / "manifest.json").write_text(json.dumps(data))


def test_a_written_bundle_opens_with_all_its_parts(out: Path) -> None:
    bundle = open_bundle(out)
    assert bundle.verify_files() == []
    assert bundle.digest == sha256_file(out / "manifest.json")
    variant = bundle.manifest.variant("onnx-cpu-fp32")
    assert bundle.manifest.variant(None) == variant
    engine = bundle.engine(variant, "vae_decoder")
    assert (engine.path / "model.onnx").read_text() == "vae_decoder engine"
    assert engine.digest == tree_digest(engine.path)
    assert bundle.contract("vae_decoder") == CONTRACTS["vae_decoder"]
    assert bundle.golden("pipeline").is_dir()
    assert (bundle.step_tables / "ddim.safetensors").is_file()
    assert [path.name for path in bundle.tokenizer.iterdir()] == ["vocab.json"]
    listed = {*bundle.manifest.files, "manifest.json"}
    assert listed == set(contents(out))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "extra", "readme"])
def test_every_difference_to_the_manifest_is_found(out: Path, damage: str) -> None:
    file = out / "engines/onnx-cpu-fp32/vae_decoder/model.onnx"
    name = file.relative_to(out).as_posix()
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[3] ^= 1
        file.write_bytes(raw)
    elif damage == "cut":
        file.write_bytes(raw[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        name = "engines/onnx-cpu-fp32/vae_decoder/more.onnx"
        (out / name).write_text("")
    else:
        name = "README.md"
        (out / name).write_text("Send money.")
    problems = open_bundle(out).verify_files()
    assert len(problems) == 1 and problems[0].startswith(name)


@pytest.mark.parametrize("bad", ["../../secret", "/etc/passwd", "C:/x", "a\\..\\b", "a/../../b"])
@pytest.mark.parametrize(
    "place",
    ["files", "engine", "golden", "tokenizer", "step_tables", "plan", "prune", "simulation"],
)
def test_a_path_that_leaves_the_bundle_is_refused(out: Path, bad: str, place: str) -> None:
    def change(data: dict[str, Any]) -> None:
        if place == "files":
            data["files"][bad] = data["files"]["README.md"]
        elif place == "engine":
            data["variants"][0]["engines"]["vae_decoder"]["path"] = bad
        elif place == "golden":
            data["golden"]["pipeline"] = bad
        elif place in ("plan", "prune", "simulation"):
            record = {place: [bad] if place == "prune" else bad}
            data["variants"][0]["compression"] = {"vae_decoder": record}
        else:
            data[place] = bad

    edit_manifest(out, change)
    with pytest.raises(BundleError, match="inside the folder"):
        open_bundle(out)


@pytest.mark.parametrize("what", ["file", "folder", "evidence", "engine folder"])
def test_a_link_anywhere_in_a_bundle_is_refused(tmp_path: Path, out: Path, what: str) -> None:
    outside = write_files(tmp_path / "outside", {"model.onnx": "vae_decoder engine"})
    if what == "file":
        (out / "README.md").unlink()
        (out / "README.md").symlink_to(outside / "model.onnx")
    elif what == "folder":
        (out / "more").symlink_to(outside)
    elif what == "evidence":
        shutil.rmtree(out / "evidence")
        (out / "evidence").symlink_to(outside)
    else:
        shutil.rmtree(out / "engines/onnx-cpu-fp32/vae_decoder")
        (out / "engines/onnx-cpu-fp32/vae_decoder").symlink_to(outside)
    with pytest.raises(BundleError, match="link"):
        open_bundle(out)


def test_a_manifest_that_contradicts_its_own_list_is_refused(out: Path) -> None:
    def swap_digest(data: dict[str, Any]) -> None:
        engines = data["variants"][0]["engines"]
        engines["vae_decoder"]["digest"] = engines["text_encoder"]["digest"]

    edit_manifest(out, swap_digest)
    with pytest.raises(BundleError, match="onnx-cpu-fp32/vae_decoder"):
        open_bundle(out)


def test_an_engine_that_no_listed_file_backs_is_refused(out: Path) -> None:
    name = "engines/onnx-cpu-fp32/vae_decoder/model.onnx"
    edit_manifest(out, lambda data: data["files"].pop(name))
    with pytest.raises(BundleError, match="no listed file"):
        open_bundle(out)


def test_what_is_no_bundle_is_refused_with_the_reason(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="a file"):
        open_bundle(out / "README.md")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle(tmp_path)
    (out / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="a JSON document"):
        open_bundle(out)


def test_unknown_names_are_answered_with_the_known_ones(out: Path) -> None:
    bundle = open_bundle(out)
    variant = bundle.manifest.variant(None)
    for ask in (bundle.contract, bundle.golden, lambda n: bundle.engine(variant, n)):
        with pytest.raises(BundleError, match="text_encoder, vae_decoder"):
            ask("unit")
    with pytest.raises(BundleError, match="onnx-cpu-fp32"):
        bundle.manifest.variant("onnx-cpu-fp23")


def test_the_readme_tells_a_stranger_what_to_do(out: Path) -> None:
    text = (out / "README.md").read_text()
    for wanted in (
        'pip install "diffoundry[onnx]"',
        "diffoundry verify .",
        "diffoundry generate .",
        'InferenceSession("engines/onnx-cpu-fp32/vae_decoder/model.onnx")',
        "np.zeros([1, 3, 8, 8], np.float32)",
        "| in | `input_ids` | int64 | [batch*, 24] |",
        "PSNR ≥ 50 dB",
        "onnxruntime ≥ 1.23",
        "Apache-2.0",
        "safety_checker",
        "`height` | 16 | 64 | 32 | 8 |",
        "evidence/",
    ):
        assert wanted in text, wanted


def test_the_example_in_the_docs_runs(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out.parent)
    exec(compile(example, "docs/bundle.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "onnx-cpu-fp32 vae_decoder onnx vae_decoder" in printed
    assert "latent: float32[batch, 3, height/4, width/4]" in printed
    assert "every file is as it was published" in printed
