"""A whole bench over real sessions: PyTorch beside a bundle's engines, nothing written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.artifacts.bundle import Bundle, open_bundle
from diffoundry.artifacts.evidence import evidence_path, read_evidence
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.benching import contenders, quality, run
from diffoundry.benching.alone import Alone, Order, measure_alone
from diffoundry.benching.contenders import Entry
from diffoundry.benching.quality import Judge
from diffoundry.benching.request import Request, parse_batches, picture_task, usual_threads
from diffoundry.benching.result import Row, fill_ratios, noise_notes
from diffoundry.benching.run import bench
from diffoundry.benching.saving import save_evidence
from diffoundry.benching.timing import Spread
from diffoundry.choosing import choose_variant
from diffoundry.errors import BundleError, MissingToolError, ModelError, UsageError
from diffoundry.formats.canonical import tree_digest
from diffoundry.quality.lpips import ALEXNET
from diffoundry.quality.metrics import MetricFiles
from tests.artifacts.working_bundle import VARIANT, working_content
from tests.core.benching import torch_bundle
from tests.core.quality.weights import make_clip, make_lpips
from tests.mini_pipelines import make_named, make_pipeline, make_tiny_vae

ENGINES_ONLY = Request(rounds=2, batches=(1, 2, 4), compiled=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture(scope="module")
def of_torch(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose variant is the mini pipeline's own modules."""
    return torch_bundle.torch_bundle(tmp_path_factory.mktemp("torch"), model)


@pytest.fixture(scope="module")
def of_onnx(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with hand-made ONNX engines; no PyTorch original exists."""
    folder = tmp_path_factory.mktemp("onnx")
    return write_bundle(folder / "bundle", working_content(folder / "parts")).bundle


@pytest.fixture
def not_alone(monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """No fresh processes: each starts PyTorch anew. The orders are kept."""
    orders: list[Order] = []

    def pretend(order: Order) -> Alone:
        orders.append(order)
        return Alone(1000, 1.0)

    monkeypatch.setattr(run, "measure_alone", pretend)
    return orders


def test_pytorch_and_variants_stand_in_one_document(
    of_torch: Bundle, model: Path, not_alone: list[Order]
) -> None:
    before = tree_digest(of_torch.path)
    said: list[str] = []
    request = Request(rounds=2, threads=1, batches=(1, 2, 4), model=model, compiled=False)
    document = bench(of_torch, request, say=said.append).as_document()
    assert [row["name"] for row in document["baselines"]] == ["PyTorch eager", "diffusers pipeline"]
    (variant,) = document["variants"]
    assert variant["name"] == torch_bundle.VARIANT
    assert variant["against_pytorch_eager"] > 0
    assert document["baselines"][0]["against_pytorch_eager"] == 1.0
    assert set(variant["components"]) == set(torch_bundle.COMPONENTS)
    for measured in variant["components"].values():
        assert measured["against_pytorch_eager"] > 0
        assert measured["seconds"]["p10"] <= measured["seconds"]["p90"]
    assert set(variant["throughput"]) == {"1", "2"}
    assert any("batch 4 is not measured" in note for note in document["notes"])
    assert variant["size_bytes"]["unet"] > 0 and variant["peak_memory_bytes"] == 1000
    assert variant["verdict"]["against"] == "PyTorch eager"
    assert document["absent"] == [{"name": "torch.compile", "why": "left out by --no-compile"}]
    assert "prompt_accuracy" not in variant and "not exposed" in document["energy"]
    assert [order.entry.kind for order in not_alone] == ["eager", "diffusers", "engine"]
    assert said
    assert tree_digest(of_torch.path) == before


def test_a_preview_decoder_is_a_component_that_pytorch_does_not_have(
    model: Path, tmp_path: Path, not_alone: list[Order]
) -> None:
    bundle = torch_bundle.torch_bundle(tmp_path, model, make_tiny_vae(tmp_path / "tiny"))
    request = Request(rounds=1, threads=1, batches=(1,), model=model, compiled=False)
    document = bench(bundle, request).as_document()
    (variant,) = document["variants"]
    assert set(variant["components"]) == {*torch_bundle.COMPONENTS, "preview_decoder"}
    assert variant["components"]["preview_decoder"]["against_pytorch_eager"] is None
    # A picture is decoded in full.
    assert set(variant["size_bytes"]) == set(torch_bundle.COMPONENTS)
    eager = document["baselines"][0]
    assert set(eager["components"]) == set(torch_bundle.COMPONENTS)


def trained_further(model: Path, target: Path) -> Path:
    """A copy whose U-Net's first and last layers are 2 % larger."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, target)
    path = target / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"] = weights["conv_out.weight"] * np.float32(1.02)
    weights["conv_in.weight"] = weights["conv_in.weight"] * np.float32(1.02)
    save_file(weights, path, {"format": "pt"})
    return target


def test_another_model_is_refused(
    of_torch: Bundle, model: Path, tmp_path: Path, not_alone: list[Order]
) -> None:
    sizes = make_named(tmp_path / "odd", "odd_widths")
    weights = trained_further(model, tmp_path / "further")
    for other, found in ((sizes, "other sizes"), (weights, "computes something else")):
        request = dataclasses.replace(ENGINES_ONLY, model=other)
        with pytest.raises(ModelError, match=found):
            bench(of_torch, request)


def test_an_embedded_model_of_another_version_is_absent_with_the_reason(
    of_torch: Bundle, tmp_path: Path, not_alone: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_pipeline(tmp_path / "mini", kind="lcm", seed=9)
    monkeypatch.setattr(contenders, "SHAPES_LCM", weights)
    document = bench(of_torch, ENGINES_ONLY).as_document()
    assert document["baselines"] == []
    whys = {one["name"]: one["why"] for one in document["absent"]}
    assert "computes something else" in whys["PyTorch eager"]
    assert whys["diffusers pipeline"] == whys["PyTorch eager"]
    assert [row["name"] for row in document["variants"]] == [torch_bundle.VARIANT]


def test_what_cannot_be_compiled_is_absent_with_the_reason(
    of_torch: Bundle, model: Path, not_alone: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    class Broken(torch.nn.Module):
        def forward(self, *inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda module: Broken())
    request = Request(rounds=1, batches=(1,), model=model)
    document = bench(of_torch, request).as_document()
    (absent,) = document["absent"]
    assert absent["name"] == "torch.compile" and absent["why"].endswith("no C++ compiler")
    assert "torch.compile" not in [row["name"] for row in document["baselines"]]


def test_without_the_original_pytorch_is_said_to_be_absent(
    of_onnx: Bundle, not_alone: list[Order]
) -> None:
    document = bench(of_onnx, ENGINES_ONLY).as_document()
    assert document["baselines"] == []
    (absent,) = document["absent"]
    assert absent["name"] == "PyTorch" and "--model DIR" in absent["why"]
    (variant,) = document["variants"]
    assert variant["against_pytorch_eager"] is None
    assert variant["verdict"]["pays"] is None
    assert set(variant["throughput"]) == {"1", "2"}  # the contract ends at 2


def test_a_variant_that_cannot_run_is_absent_or_an_error_when_asked_for(
    tmp_path: Path, not_alone: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = working_content(tmp_path / "parts")
    (one,) = content.variants
    both = (one, dataclasses.replace(one, name="elsewhere"))
    bundle = write_bundle(tmp_path / "b", dataclasses.replace(content, variants=both)).bundle
    problem = MissingToolError("a runtime", remedy="install it")
    monkeypatch.setattr(
        contenders, "runtime_problem", lambda v: problem if v.name == "elsewhere" else None
    )
    result = bench(bundle, ENGINES_ONLY)
    assert [row.entry.name for row in result.variants] == [VARIANT]
    assert ("elsewhere", True) in [(one.name, "install it" in one.why) for one in result.absent]
    with pytest.raises(MissingToolError):
        bench(bundle, ENGINES_ONLY, ("elsewhere",))
    monkeypatch.setattr(contenders, "runtime_problem", lambda v: problem)
    with pytest.raises(MissingToolError):
        bench(bundle, ENGINES_ONLY)


def test_unknown_variants_and_changed_files_are_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", working_content(tmp_path / "parts")).bundle
    with pytest.raises(BundleError, match=VARIANT):
        bench(bundle, ENGINES_ONLY, ("tflite",))
    (bundle.path / "README.md").write_text("changed")
    with pytest.raises(BundleError, match=r"README\.md"):
        bench(open_bundle(bundle.path), ENGINES_ONLY)


def test_a_fresh_process_reports_its_own_memory(of_onnx: Bundle) -> None:
    task = picture_task(of_onnx)
    found = measure_alone(Order(of_onnx.path, Entry(VARIANT, "engine", "cpu"), task, 1))
    assert found.problem == ""
    assert found.peak_memory_bytes and found.peak_memory_bytes > 2**20
    assert found.first_picture_seconds and found.first_picture_seconds > 0
    gone = measure_alone(Order(of_onnx.path, Entry("gone", "engine", "cpu"), task, 1))
    assert gone.peak_memory_bytes is None and "gone" in gone.problem


def test_quality_is_judged_and_saved_where_the_model_has_a_judge(
    tmp_path: Path, not_alone: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "b", working_content(tmp_path / "parts")).bundle
    pairs = [("a red circle", 1), ("a blue square", 2), ("a cat", 3)]
    judge = Judge(
        pairs,
        read=lambda image: image.shape,
        wanted=lambda prompt: None if prompt == "a cat" else (24, 24, 3),
    )
    monkeypatch.setattr(quality, "judge_of", lambda bundle, count: judge)
    monkeypatch.setattr(quality, "STEPS", 2)  # the bundle's only table
    result = bench(bundle, dataclasses.replace(ENGINES_ONLY, pairs=3))
    (variant,) = result.as_document()["variants"]
    assert variant["prompt_accuracy"] == pytest.approx(2 / 3)
    assert variant["quality"]["steps"] == 2 and variant["quality"]["paired"] is None
    assert variant["metrics"]["clip_score"] is None
    assert "--clip DIR" in variant["metrics"]["not_measured"]["clip_score"]
    assert not any("no recogniser" in note for note in result.notes)
    path = save_evidence(bundle, result)
    assert path == evidence_path(bundle.path)
    saved = read_evidence(path).variants[VARIANT]
    assert saved.prompt_accuracy == pytest.approx(2 / 3)
    assert saved.bench is not None and saved.bench["settings"]["rounds"] == 2
    assert choose_variant(bundle).why.startswith("the fastest of 1 measured here")
    assert bundle.verify_files() == []


def test_a_model_without_a_recogniser_is_said(of_onnx: Bundle, not_alone: list[Order]) -> None:
    result = bench(of_onnx, dataclasses.replace(ENGINES_ONLY, pairs=2))
    assert quality.NO_RECOGNISER in result.notes
    assert any("lpips" in note and "--lpips FILE" in note for note in result.notes)
    assert all(row.quality is None for row in result.rows)


def test_metrics_over_named_weights_need_no_recogniser(
    of_torch: Bundle, model: Path, not_alone: list[Order], tmp_path: Path
) -> None:
    """The variant is the model itself, so every distance to PyTorch is nothing."""
    files = MetricFiles(
        clip=make_clip(tmp_path / "clip"), lpips=make_lpips(tmp_path / "a.safetensors", ALEXNET)
    )
    request = Request(1, 1, (1,), model, compiled=False, pairs=3, metrics=files)
    document = bench(of_torch, request).as_document()
    (variant,) = document["variants"]
    found = variant["metrics"]
    assert found["reference"] == "PyTorch eager" and found["pairs"] == 3 and found["steps"] == 2
    assert found["lpips"] == found["clip_score_change"] == 0
    assert found["fid_clip"] == pytest.approx(0, abs=1e-9)
    assert found["clip_score"] == document["baselines"][0]["metrics"]["clip_score"]
    assert found["fid"] is None and "--fid FILE" in found["not_measured"]["fid"]
    assert "metrics" not in document["baselines"][1], "diffusers' own pipeline is only timed"
    notes = " ".join(document["notes"])
    assert "--fid FILE" in notes and "FID over 3 pictures" in notes and "no recogniser" in notes
    assert str(tmp_path) not in json.dumps(document), "no path of this machine"


def row(name: str, kind: str, seconds: float, size: int = 100) -> Row:
    made = Row(Entry(name, kind, "cpu"), {"unet": size})  # type: ignore[arg-type]
    made.picture = Spread(seconds, seconds, seconds, 1)
    return made


def test_a_run_that_other_work_disturbed_says_so() -> None:
    calm, wild = row("calm", "engine", 1.0), row("wild", "engine", 1.0)
    wild.picture = Spread(1.0, 0.5, 4.0, 9)
    (note,) = noise_notes([calm, wild])
    assert "wild 8.0 ×" in note and "calm" not in note
    assert noise_notes([calm]) == []


def test_ratios_are_never_taken_across_devices() -> None:
    rows = [row("PyTorch eager", "eager", 4.0), row("full", "engine", 2.0)]
    rows[1].entry = Entry("full", "engine", "cuda")
    fill_ratios(rows)
    assert rows[1].ratio is None


def test_batches_are_numbers_from_one_on() -> None:
    assert parse_batches(" 4, 1,1 ") == (1, 4)
    for text in ("", "0", "1,,2", "a", "-1", "1.5", "²"):
        with pytest.raises(UsageError, match="--batch"):
            parse_batches(text)
    assert usual_threads() >= 1
