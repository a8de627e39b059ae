"""What the report says of a bundle: verdicts, scores, pictures, and when it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.evidence import (
    Evidence,
    VariantEvidence,
    evidence_path,
    new_evidence,
)
from diffoundry.cli.main import main
from diffoundry.errors import BundleError, MissingToolError
from diffoundry.parity.checks.shape_range import NOT_VISITED
from diffoundry.reporting import pictures as pictures_module
from diffoundry.reporting.attributes import REFERENCE, TOGETHER
from diffoundry.reporting.gathering import Report, as_document, gather
from diffoundry.reporting.markup import Html, el, join
from diffoundry.reporting.page import write_page
from diffoundry.reporting.pictures import Pair, Pictures, difference_map
from diffoundry.reporting.proof import deferred_section
from diffoundry.reporting.verdict import judge, read_all
from diffoundry.types import CheckResult, ParityResult
from tests.artifacts.working_bundle import VARIANT


def evidence(bundle: Path, *statuses: str, subject: str = "unet") -> Evidence:
    checks = tuple(CheckResult("call", "call", one, subject) for one in statuses)  # type: ignore[arg-type]
    found = VariantEvidence(results=(ParityResult(subject, checks),))
    return new_evidence(open_bundle(bundle).digest, {VARIANT: found})


@pytest.mark.parametrize(
    ("hosts", "verdict"),
    [
        ((("passed", "info"),), "passed"),
        ((("passed",), ("passed", "failed")), "failed"),
        ((("deferred",),), "deferred"),
        ((("deferred",), ("passed",)), "passed"),
        ((("info",),), "failed"),
        ((), "not checked"),
    ],
)
def test_the_verdict_is_the_worst_that_no_host_has_made_good(
    bundle: Path, hosts: Sequence[Sequence[str]], verdict: str
) -> None:
    found = judge(open_bundle(bundle), [evidence(bundle, *one) for one in hosts])
    assert found.status == verdict
    assert found.title in {"Passed", "Failed", "Incomplete", "Not checked"}


def test_sizes_that_no_build_checks_stand_beside_the_verdict(bundle: Path) -> None:
    opened, seen = open_bundle(bundle), evidence(bundle, "passed")
    assert "NOT checked" not in judge(opened, [seen]).sentence
    mark = CheckResult("shape_range", "at batch=4", "info", "unet", values={NOT_VISITED: True})
    passed = CheckResult("call", "call", "passed", "unet")
    result = ParityResult("unet", (passed, mark))
    unseen = new_evidence(opened.digest, {VARIANT: VariantEvidence(results=(result,))})
    found = judge(opened, [unseen])
    assert found.status == "passed" and "NOT checked: batch=4)" in found.sentence


def test_evidence_of_another_bundle_or_damaged_is_named_and_not_used(
    bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    other = evidence(bundle, "passed").model_copy(update={"manifest_digest": "sha256:" + 64 * "0"})
    evidence_path(tmp_path / "bundle", "other").write_text(other.to_json(), "utf-8")
    evidence_path(tmp_path / "bundle", "torn").write_text("{", "utf-8")
    found, notes = read_all(open_bundle(tmp_path / "bundle"))
    assert len(found) == 1
    assert [line.split()[0] for line in notes] == ["evidence/other.json", "evidence/torn.json"]


def test_a_damaged_bundle_gets_no_page(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    engine = next((tmp_path / "bundle" / "engines").rglob("*.onnx"))
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(BundleError, match="bytes, not"):
        gather(tmp_path / "bundle")


def test_engines_run_on_the_recorded_noise(bundle: Path) -> None:
    (pair,) = gather(bundle).pictures.pairs
    (engine,) = pair.engines
    assert engine.image is not None and engine.image.shape == pair.reference.shape
    assert engine.psnr_db is not None and engine.psnr_db > 100


def test_a_missing_runtime_is_said_and_the_rest_is_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = MissingToolError(
        f"variant {VARIANT}", expected="onnxruntime", remedy="pip install it"
    )
    monkeypatch.setattr(pictures_module, "runtime_problem", lambda variant: problem)
    found = gather(bundle)
    assert found.pictures.pairs[0].engines == ()
    text = write_page(found)
    assert f"No pictures of <code>{VARIANT}</code>" in text and "pip install it" in text


def test_only_what_no_host_has_completed_is_deferred(bundle: Path, report: Report) -> None:
    waiting, done = evidence(bundle, "deferred"), evidence(bundle, "passed")
    check = dataclasses.replace(waiting.variants[VARIANT].results[0].checks[0], message="no GPU")
    results = (ParityResult("unet", (check,)),)
    waiting = waiting.model_copy(update={"variants": {VARIANT: VariantEvidence(results=results)}})
    alone = deferred_section(dataclasses.replace(report, evidence=(waiting,)))
    assert "call of unet: no GPU" in alone
    assert "no GPU" not in deferred_section(dataclasses.replace(report, evidence=(waiting, done)))


def test_an_unreadable_picture_counts_as_wrong_throughout(report: Report) -> None:
    for name in ("colour", "shape", "size", "background", TOGETHER):
        score = report.scores[name]
        assert (score[REFERENCE].hits, score[REFERENCE].count) == (2, 2)
        assert (score[VARIANT].hits, score[VARIANT].count) == (1, 2)


def test_the_difference_map_is_brighter_where_more_is_wrong() -> None:
    reference = np.zeros((1, 3, 3), np.float32)
    image = reference + np.array([0.0, 0.001, 0.01], np.float32)[None, :, None]
    brightness = difference_map(reference, image, 50).sum(axis=-1)[0]
    assert brightness[0] < brightness[1] < brightness[2]


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 1), (0.9, 1), (0.008, 100), (1e-12, 10**7)])
def test_the_factor_makes_the_usual_difference_visible(
    report: Report, largest: float, factor: int
) -> None:
    pair = report.pictures.pairs[0]
    engine = pictures_module.EnginePicture("v", largest=largest)
    assert Pictures((Pair(pair.recorded, pair.reference, (engine,)),), {}).factor("v") == factor


def test_text_is_escaped_and_markup_is_not() -> None:
    assert join("<b>", Html("<i>")) == "&lt;b&gt;<i>"
    assert el("p", "a", title='"<', hidden=True, id=None) == '<p title="&quot;&lt;" hidden>a</p>'
    assert el("rect", width=1.5) == '<rect width="1.5"/>'


def test_the_document_is_json_and_holds_every_part(report: Report) -> None:
    document = json.loads(json.dumps(as_document(report)))
    assert document["verdict"]["status"] == "passed"
    assert document["pictures"][1]["reads"][REFERENCE]["right"] is True
    assert document["attributes"]["shape"][VARIANT]["accuracy"] == 0.5
    assert document["parity"][0]["rows"] and document["lineage"][VARIANT]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["diffoundry", "report", *arguments])
        main()
    return int(end.value.code or 0), capsys.readouterr()


def test_the_command_writes_the_page(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "report.html"
    code, out = run(capsys, str(bundle), "--out", str(page))
    assert code == 0 and page.read_text("utf-8").startswith("<!doctype html>")
    assert out.out.startswith("Passed: ")


def test_json_prints_the_data_and_writes_nothing(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = run(capsys, str(bundle), "--json")
    assert code == 0 and json.loads(out.out)["schema"] == "diffoundry.report/1.0"
    assert list(tmp_path.iterdir()) == []


def test_a_page_inside_the_bundle_is_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, str(bundle), "--out", str(bundle / "report.html"))
    assert code == 2 and "outside the bundle" in out.err
    assert not (bundle / "report.html").exists()
