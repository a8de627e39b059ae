"""Which variant runs: the named one, the fastest measured here, or the profile's first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from diffoundry import choosing
from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import (
    VariantEvidence,
    evidence_path,
    new_evidence,
    update_evidence,
)
from diffoundry.artifacts.manifest import Power
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.choosing import choose_variant
from diffoundry.errors import BundleError, DeferredError, MissingToolError, UsageError
from diffoundry.formats.canonical import sha256_bytes
from diffoundry.runtimes.onnx_session import OnnxSession
from tests.artifacts.tiny_bundle import tiny_content
from tests.core import stand_ins
from tests.core.stand_ins import Elsewhere


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Three variants: first, second, third."""
    content = tiny_content(tmp_path / "parts")
    (one,) = content.variants
    variants = tuple(dataclasses.replace(one, name=name) for name in ("first", "second", "third"))
    return write_bundle(tmp_path / "b", dataclasses.replace(content, variants=variants)).bundle


def measured(seconds: object) -> VariantEvidence:
    return VariantEvidence(bench={"picture_seconds": {"median": seconds}})


def write(bundle: Bundle, digest: str | None = None, **seconds: object) -> None:
    variants = {name: measured(value) for name, value in seconds.items()}
    update_evidence(bundle.path, new_evidence(digest or bundle.digest, variants))


def test_without_evidence_the_profile_order_decides(bundle: Bundle) -> None:
    choice = choose_variant(bundle)
    assert choice.variant.name == "first"
    assert choice.why == "the first whose runtime (onnx_session) is here"


def test_the_fastest_that_was_measured_here_is_taken_and_the_reason_said(bundle: Bundle) -> None:
    write(bundle, first=0.2, second=0.05)
    choice = choose_variant(bundle)
    assert choice.variant.name == "second"
    assert choice.why == "the fastest of 2 measured here (50.0 ms a picture)"


def test_a_name_on_the_command_line_wins(bundle: Bundle) -> None:
    write(bundle, second=0.05)
    assert choose_variant(bundle, "third").variant.name == "third"
    with pytest.raises(BundleError, match="fourth"):
        choose_variant(bundle, "fourth")


@pytest.fixture
def powered(tmp_path: Path) -> Bundle:
    """first has no power, second and third are low, fourth is full."""
    content = tiny_content(tmp_path / "powered")
    (one,) = content.variants
    powers: dict[str, Power | None] = {
        "first": None, "second": "low", "third": "low", "fourth": "full",
    }  # fmt: skip
    variants = tuple(dataclasses.replace(one, name=n, power=p) for n, p in powers.items())
    return write_bundle(tmp_path / "p", dataclasses.replace(content, variants=variants)).bundle


def test_a_power_leaves_only_the_variants_that_were_built_for_it(powered: Bundle) -> None:
    choice = choose_variant(powered, power="low")
    assert choice.variant.name == "second"
    assert choice.why == "the first of power low whose runtime (onnx_session) is here"
    write(powered, first=0.01, third=0.1, second=0.2, fourth=0.02)
    choice = choose_variant(powered, power="low")
    assert choice.variant.name == "third"
    assert choice.why == "the fastest of 2 of power low measured here (100.0 ms a picture)"
    assert choose_variant(powered, power="full").variant.name == "fourth"
    assert choose_variant(powered).variant.name == "first"


def test_what_was_built_for_less_power_is_taken_only_when_asked_for(
    powered: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow net is always the fastest: nobody should get it without a word."""
    write(powered, second=0.01, third=0.02, fourth=0.5)
    assert choose_variant(powered).variant.name == "fourth"
    gone = MissingToolError("onnxruntime")
    monkeypatch.setattr(choosing, "runtime_problem", lambda v: None if v.power == "low" else gone)
    assert choose_variant(powered).variant.name == "second"


def test_a_power_that_nobody_has_is_answered_with_those_there_are(powered: Bundle) -> None:
    with pytest.raises(BundleError, match="balanced") as raised:
        choose_variant(powered, power="balanced")
    for words in ("first (no power named)", "third (low)", "fourth (full)"):
        assert words in raised.value.found


def test_a_name_and_a_power_at_once_are_refused(powered: Bundle) -> None:
    with pytest.raises(UsageError, match="--power"):
        choose_variant(powered, "second", "low")


def test_evidence_of_another_manifest_or_host_does_not_count(bundle: Bundle) -> None:
    write(bundle, sha256_bytes(b"another build"), second=0.05)
    assert choose_variant(bundle).variant.name == "first"
    own = evidence_path(bundle.path)
    write(bundle, second=0.05)
    own.rename(own.with_name("elsewhere.json"))
    assert choose_variant(bundle).variant.name == "first"


@pytest.mark.parametrize("median", [0, -1.0, "fast", True, None, [1]])
def test_figures_that_are_none_are_passed_over(bundle: Bundle, median: Any) -> None:
    write(bundle, first=0.2, second=median)
    assert choose_variant(bundle).variant.name == "first"


def test_evidence_that_cannot_be_read_is_passed_over(bundle: Bundle) -> None:
    evidence_path(bundle.path).parent.mkdir(exist_ok=True)
    for text in ("{", json.dumps({"schema": "diffoundry.evidence/1.0"})):
        evidence_path(bundle.path).write_text(text)
        assert choose_variant(bundle).variant.name == "first"


def test_a_measured_variant_whose_runtime_is_gone_is_not_taken(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(bundle, first=0.2, second=0.05)
    gone = MissingToolError("onnxruntime")
    monkeypatch.setattr(
        choosing, "runtime_problem", lambda variant: gone if variant.name == "second" else None
    )
    assert choose_variant(bundle).variant.name == "first"
    later = DeferredError("a GPU")
    monkeypatch.setattr(
        choosing, "runtime_problem", lambda variant: gone if variant.name == "second" else later
    )
    with pytest.raises(MissingToolError):
        choose_variant(bundle)


def test_a_stand_in_runs_only_a_variant_that_was_named_and_it_is_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = Elsewhere(OnnxSession())
    monkeypatch.setattr(choosing, "runtime_named", stand_ins.named(native, native.understudy))
    with pytest.raises(DeferredError):
        choose_variant(bundle)
    choice = choose_variant(bundle, "second")
    assert choice.by_stand_in
    assert stand_ins.UNDERSTUDY in choice.why and stand_ins.NOTE in choice.why
    with pytest.raises(DeferredError):
        choosing.open_variant(bundle, choice.variant)
    native.problem = None
    assert not choose_variant(bundle, "second").by_stand_in
