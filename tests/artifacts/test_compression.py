"""What was made smaller on purpose travels in the bundle: listed, digested, read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts.bundle import Bundle, open_bundle
from diffoundry.artifacts.compression import Compressed, read_compression
from diffoundry.artifacts.content import BundleContent, CompressionContent
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.errors import BundleError
from tests.artifacts.tiny_bundle import tiny_content, write_files

LAYERS = [{"module": "a", "scheme": "static"}, {"module": "b", "scheme": "static"},
          {"module": "c", "scheme": "weight_only"}]  # fmt: skip


def prune(before: int, after: int) -> str:
    change = {"before": before, "after": after}
    return json.dumps({"parameters": change, "multiply_adds": change})


def compressed_content(folder: Path) -> BundleContent:
    """The tiny bundle's variant, its decoder pruned twice and quantized."""
    made = write_files(folder / "records", {
        "plan.json": json.dumps({"layers": LAYERS}),
        "first/prune.json": prune(1000, 900),
        "second/prune.json": prune(900, 700),
        "simulation/simulation.json": "{}",
    })  # fmt: skip
    content = tiny_content(folder / "parts")
    (variant,) = content.variants
    record = CompressionContent(
        made / "plan.json",
        (made / "first/prune.json", made / "second/prune.json"),
        made / "simulation",
    )
    variant = dataclasses.replace(
        variant, precision="int8", compression={"vae_decoder": record}, power="low"
    )
    return dataclasses.replace(content, variants=(variant,))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "b", compressed_content(tmp_path)).bundle


def edit(bundle: Bundle, **record: Any) -> None:
    """Change the manifest's record of the decoder."""
    path = bundle.path / "manifest.json"
    data = json.loads(path.read_text())
    data["variants"][0]["compression"]["vae_decoder"].update(record)
    path.write_text(json.dumps(data))


def test_records_lie_below_compression_and_every_file_is_listed(bundle: Bundle) -> None:
    folder = "compression/onnx-cpu-fp32/vae_decoder"
    names = {name for name in bundle.manifest.files if name.startswith("compression/")}
    wanted = ("plan.json", "prune.json", "prune-2.json", "simulation/simulation.json")
    assert names == {f"{folder}/{name}" for name in wanted}
    variant = bundle.manifest.variants[0]
    plan, prunes = bundle.compression(variant, "vae_decoder")
    assert plan == bundle.path / folder / "plan.json"
    assert [path.name for path in prunes] == ["prune.json", "prune-2.json"]
    assert bundle.simulation(variant, "vae_decoder") == bundle.path / folder / "simulation"
    assert bundle.compression(variant, "text_encoder") == (None, [])
    assert bundle.simulation(variant, "text_encoder") is None
    readme = (bundle.path / "README.md").read_text()
    assert "`compression/`" in readme and "`--power low` takes `onnx-cpu-fp32`" in readme


def test_a_changed_record_is_found_by_its_digest(bundle: Bundle) -> None:
    path = bundle.path / "compression/onnx-cpu-fp32/vae_decoder/prune.json"
    path.write_text(path.read_text().replace("900", "800"))
    (problem,) = open_bundle(bundle.path).verify_files()
    assert problem.startswith("compression/onnx-cpu-fp32/vae_decoder/prune.json")


@pytest.mark.parametrize("record", [{"plan": "compression/other.json"}, {"simulation": "nowhere"}])
def test_a_record_that_no_listed_file_backs_is_refused(bundle: Bundle, record: Any) -> None:
    edit(bundle, **record)
    with pytest.raises(BundleError, match="onnx-cpu-fp32/vae_decoder"):
        open_bundle(bundle.path)


def test_figures_go_from_before_the_first_cut_to_after_the_last(bundle: Bundle) -> None:
    found = read_compression(bundle, bundle.manifest.variants[0])
    layers = {"static": 2, "weight_only": 1}
    assert found == {"vae_decoder": Compressed(
        (1000, 700), (1000, 700), layers, frozenset("ab")
    )}  # fmt: skip
    assert found["vae_decoder"].as_json()["parameters"] == {"before": 1000, "after": 700}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"parameters": 3}', '{"parameters": {"before": "x"}}']
)
def test_records_that_say_nothing_readable_count_for_nothing(tmp_path: Path, text: str) -> None:
    content = compressed_content(tmp_path)
    for name in ("plan.json", "first/prune.json", "second/prune.json"):
        (tmp_path / "records" / name).write_text(text)
    bundle = write_bundle(tmp_path / "b", content).bundle
    assert read_compression(bundle, bundle.manifest.variants[0])["vae_decoder"] == Compressed()


def test_a_bundle_of_plain_variants_has_no_such_folder(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", tiny_content(tmp_path / "parts")).bundle
    assert not (bundle.path / "compression").exists()
    assert not bundle.manifest.variants[0].compressed
    assert "compression" not in (bundle.path / "README.md").read_text()
