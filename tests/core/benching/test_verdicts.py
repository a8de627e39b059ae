"""Does it pay? Whom each variant is held against, and when noise decides nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from diffoundry.artifacts.compression import Compressed
from diffoundry.artifacts.evidence import VariantEvidence, new_evidence, update_evidence
from diffoundry.artifacts.gain import PAYS, Gain, VariantGain
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.benching.alone import Alone
from diffoundry.benching.contenders import Entry
from diffoundry.benching.result import Row, Verdict
from diffoundry.benching.timing import Spread, spread_of
from diffoundry.benching.verdicts import (
    PICTURE,
    Traits,
    fill_verdicts,
    said_by_the_build,
    traits_of,
)
from tests.artifacts.tiny_bundle import tiny_content

FULL, SMALL = Traits("onnx_session", False), Traits("onnx_session", True)


def row(name: str, kind: str, seconds: float, size: int = 100, device: str = "cpu") -> Row:
    made = Row(Entry(name, kind, device), {"unet": size})  # type: ignore[arg-type]
    made.picture = Spread(seconds, seconds, seconds, 1)
    return made


def timed(one: Row, picture: Sequence[float], unet: Sequence[float]) -> Row:
    one.rounds = {PICTURE: picture, "unet": unet}
    one.picture, one.components = spread_of(picture), {"unet": spread_of(unet)}
    return one


def test_plain_fp32_is_held_against_pytorch_and_what_is_compressed_against_plain_fp32() -> None:
    rows = [row("PyTorch eager", "eager", 4.0), row("full", "engine", 2.0),
            row("half", "engine", 4.0, 50), row("same", "engine", 2.0 / PAYS**0.5)]  # fmt: skip
    fill_verdicts(rows, {"full": FULL, "half": SMALL, "same": SMALL})
    assert rows[0].verdict is None
    full, half, same = (one.verdict for one in rows[1:])
    assert full and full.pays and full.against == "PyTorch eager"
    assert full.text.startswith("pays: 2.00 × the speed of PyTorch eager")
    assert half and half.pays is False and half.against == "full"
    assert "does not pay in time (slower)" in half.text and "0.50 × its file size" in half.text
    assert same and same.pays is False and "no clear difference" in same.text


def test_only_an_engine_of_the_same_runtime_is_a_baseline() -> None:
    """A faster runtime's fp32 says nothing of what INT8 buys on this one."""
    rows = [row("PyTorch eager", "eager", 4.0), row("openvino", "engine", 1.0),
            row("int8", "engine", 2.0)]  # fmt: skip
    fill_verdicts(rows, {"openvino": Traits("openvino_session", False), "int8": SMALL})
    verdict = rows[2].verdict
    assert verdict and verdict.pays and verdict.against == "PyTorch eager"
    fill_verdicts(rows[1:], {"openvino": Traits("openvino_session", False), "int8": SMALL})
    assert rows[2].verdict and rows[2].verdict.pays is None


def test_a_pruned_fp32_variant_is_no_baseline() -> None:
    rows = [row("pruned", "engine", 1.0), row("full", "engine", 2.0), row("int8", "engine", 1.5)]
    fill_verdicts(rows, {"pruned": SMALL, "full": FULL, "int8": SMALL})
    assert [one.verdict.against if one.verdict else "" for one in rows] == ["full", None, "full"]


def test_a_baseline_with_the_same_shapes_comes_first() -> None:
    rows = [row("any", "engine", 2.0), row("fixed", "engine", 2.0), row("int8", "engine", 1.5)]
    fixed = Traits("onnx_session", False, "fixed")
    traits = {"any": FULL, "fixed": fixed, "int8": Traits("onnx_session", True, "fixed")}
    fill_verdicts(rows, traits)
    assert rows[2].verdict and rows[2].verdict.against == "fixed"


def test_verdicts_are_never_given_across_devices() -> None:
    rows = [row("PyTorch eager", "eager", 4.0), row("full", "engine", 2.0, device="cuda")]
    fill_verdicts(rows, {"full": FULL})
    assert rows[1].verdict and rows[1].verdict.pays is None


def test_a_median_that_only_noise_made_lower_does_not_pay() -> None:
    rows = [row("PyTorch eager", "eager", 4.0), row("full", "engine", 2.0)]
    rows[1].picture = Spread(2.0, 1.0, 9.0, 9)
    fill_verdicts(rows, {"full": FULL})
    assert rows[1].verdict and rows[1].verdict.pays is False
    assert "no clear difference" in rows[1].verdict.text


def test_every_component_has_a_verdict_with_size_memory_and_the_spread_of_ratios() -> None:
    """The U-Net pays, the rest eats it up: both are said."""
    base = timed(row("full", "engine", 0, 400), [4.0, 4.0, 4.4], [2.0, 2.0, 2.2])
    small = timed(row("int8", "engine", 0, 100), [4.0, 5.0, 5.5], [1.0, 1.0, 1.0])
    small.compression = {"unet": Compressed(integer_modules=frozenset("abcd"))}
    small.integer_layers = {"unet": 3}
    base.alone, small.alone = Alone(1000, 1.0), Alone(600, 1.0)
    fill_verdicts([base, small], {"full": FULL, "int8": SMALL})
    verdict = small.verdict
    assert verdict and verdict.gain and verdict.pays is False
    unet = verdict.components["unet"]
    assert unet.pays and unet.word == "pays 2.00 ×" and unet.speed == 2.0
    assert (unet.p10, unet.p90) == (2.0, pytest.approx(2.16))
    assert unet.kernels == "ONLY 3 of 4 planned layers in integer kernels"
    assert (unet.size_bytes, unet.baseline_size_bytes) == (100, 400)
    assert verdict.gain.word == "DOES NOT PAY 0.80 ×"
    assert "0.60 × its memory" in verdict.text and "round by round" in verdict.text
    document = small.as_json()
    assert document["verdict"]["gain"]["peak_memory_bytes"] == 600
    assert document["components"]["unet"]["gain"]["speed"] == 2.0


def test_what_the_build_measured_is_said_where_the_bundle_has_no_fp32_peer(tmp_path: Path) -> None:
    content = tiny_content(tmp_path / "parts")
    (full,) = content.variants
    small = dataclasses.replace(full, name="int8", precision="int8")
    content = dataclasses.replace(content, variants=(small,))
    bundle = write_bundle(tmp_path / "b", content).bundle
    gain = Gain(pays=False, speed=0.8, rounds=3, seconds=1.0, baseline_seconds=0.8)
    built = VariantGain(against="the fp32 engines", components={"unet": gain}, picture=gain)
    rows = [row("PyTorch eager", "eager", 4.0), row("int8", "engine", 1.0)]
    fill_verdicts(rows, traits_of(bundle.manifest.variants))
    assert said_by_the_build(bundle, rows) == []
    variants = {"int8": VariantEvidence(gain=built)}
    update_evidence(bundle.path, new_evidence(bundle.digest, variants))
    (line,) = said_by_the_build(bundle, rows)
    assert line.startswith("int8, when it was built, against the fp32 engines: a picture DOES NOT")
    assert line.endswith("unet DOES NOT PAY 0.80 ×")
    rows[1].verdict = Verdict(True, "int8", "against a variant of the bundle")
    assert said_by_the_build(bundle, rows) == []
