"""Publishing: a variant that somebody refused stays out, what it gains goes into the evidence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.evidence import evidence_path, read_evidence
from diffoundry.artifacts.gain import Gain, VariantGain
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.building.driver import Outcome
from diffoundry.building.publishing import VariantOutcome, publish
from diffoundry.errors import ExitCode, StageError
from diffoundry.formats.canonical import sha256_file
from diffoundry.planning.planner import make_plan
from diffoundry.types import Artifact
from tests.artifacts.working_bundle import working_content

BOTH = """
schema = "diffoundry.profile/1.0"
name = "both"
include = ["onnx-cpu", "onnx-cpu-fp16"]
"""
FULL, HALF = "onnx-cpu-fp32", "onnx-cpu-fp16"
GAIN = VariantGain(
    against=FULL,
    picture=Gain(pays=False, speed=0.9, rounds=3, seconds=1.0, baseline_seconds=0.9),
)
REFUSED = StageError("--require-gain 1.2", found="0.90 ×")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of two variants that is over; its engines and recordings are hand-made ones."""
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "both.toml").write_text(BOTH)
    plan = make_plan(None, str(tmp_path / "both.toml"))
    content = working_content(tmp_path / "parts")
    engines = content.variants[0].engines
    folders = {plan.recordings[name]: path for name, path in content.golden.items()}
    folders |= {plan.recordings["vae_encoder"]: content.golden["unet"]}
    folders[plan.step_tables] = content.step_tables

    def artifact(reference: str) -> Artifact:
        engine = engines.get(reference.partition(".")[0], engines["unet"])
        if reference not in folders:
            return engine
        return Artifact(engine.type, folders[reference], engine.digest)

    return SimpleNamespace(
        plan=plan,
        artifact=artifact,
        source_artifacts=lambda: {"unet": engines["unet"]},
        outcomes={name: Outcome(node, "hit") for name, node in plan.nodes.items()},
        store=SimpleNamespace(hashes=HashCache(None)),
    )


def outcomes(*, full: ExitCode = ExitCode.DONE) -> tuple[VariantOutcome, VariantOutcome]:
    return VariantOutcome(FULL, full), VariantOutcome(HALF, ExitCode.DONE).with_gain(GAIN)


def test_what_a_variant_gains_goes_into_evidence_and_json(driver: Any, tmp_path: Path) -> None:
    found = publish(driver, tmp_path / "out", outcomes())
    evidence = read_evidence(evidence_path(tmp_path / "out"))
    assert evidence.variants[HALF].gain == GAIN and evidence.variants[FULL].gain is None
    assert [one["gain"] for one in found.as_json()["variants"]] == [None, GAIN]
    assert [v.compressed for v in open_bundle(tmp_path / "out").manifest.variants] == [False, True]


def test_a_refused_variant_stays_out_and_the_other_is_published(
    driver: Any, tmp_path: Path
) -> None:
    full, half = outcomes()
    found = publish(driver, tmp_path / "out", (full, half.refused(REFUSED)))
    assert [v.name for v in open_bundle(tmp_path / "out").manifest.variants] == [FULL]
    assert f"{HALF}: not published, --require-gain 1.2 failed" in found.lines()
    assert [one.published for one in found.variants] == [True, False]


def test_where_nothing_is_left_the_old_bundle_stays(driver: Any, tmp_path: Path) -> None:
    publish(driver, tmp_path / "out", outcomes())
    before = sha256_file(tmp_path / "out" / "manifest.json")
    full, half = outcomes(full=ExitCode.FAILED)
    found = publish(driver, tmp_path / "out", (full, half.refused(REFUSED)))
    assert found.path is None
    assert sha256_file(tmp_path / "out" / "manifest.json") == before
