"""evidence/<host>.json: merged, never mixed between manifests, free of this machine's folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffoundry.artifacts.evidence import (
    Evidence,
    StageMeasure,
    VariantEvidence,
    evidence_path,
    host_name,
    new_evidence,
    read_evidence,
    this_host,
    update_evidence,
    without_folders,
)
from diffoundry.artifacts.gain import Gain, VariantGain
from diffoundry.errors import ArtifactError, BundleError
from diffoundry.formats.canonical import sha256_bytes
from diffoundry.types import CheckResult, ParityResult

DIGEST = sha256_bytes(b"manifest")
STAGE = StageMeasure(stage="capture", seconds=2.0, peak_memory_bytes=5)


def result(status: str, message: str = "") -> ParityResult:
    return ParityResult("unet", (CheckResult("call", "x", status, message=message),))  # type: ignore[arg-type]


def evidence(digest: str = DIGEST, **variants: VariantEvidence) -> Evidence:
    return new_evidence(digest, variants)


def test_the_host_is_described_without_importing_what_it_has(tmp_path: Path) -> None:
    host = this_host()
    assert host.cores >= 1 and host.python.count(".") == 2
    assert host.packages["numpy"]
    assert evidence_path(tmp_path).name == f"{host_name()}.json"
    assert "/" not in host_name() and host_name()


def test_new_results_replace_old_ones_and_completed_checks_add_up(tmp_path: Path) -> None:
    first = VariantEvidence(results=(result("deferred"),), size_bytes=7, completed=("unet: call",))
    update_evidence(tmp_path, new_evidence(DIGEST, {"a": first, "b": first}, (STAGE,)))
    second = VariantEvidence(results=(result("passed"),), completed=("unet: image",))
    path = update_evidence(tmp_path, evidence(a=second))
    read = read_evidence(path)
    assert read.variants["a"].results[0].passed
    assert read.variants["a"].completed == ("unet: call", "unet: image")
    assert read.variants["a"].size_bytes == 7
    assert read.variants["b"] == first
    assert read.stages == (STAGE,)


def test_a_bench_and_a_verification_keep_each_other(tmp_path: Path) -> None:
    update_evidence(tmp_path, evidence(a=VariantEvidence(results=(result("passed"),))))
    benched = VariantEvidence(bench={"picture_seconds": {"median": 0.1}}, prompt_accuracy=0.0)
    pytorch = {"PyTorch eager": {"picture_seconds": {"median": 0.2}}}
    update_evidence(tmp_path, new_evidence(DIGEST, {"a": benched}, baselines=pytorch))
    again = VariantEvidence(results=(result("failed"),), bench={"rounds": 3})
    read = read_evidence(update_evidence(tmp_path, evidence(a=again)))
    assert read.variants["a"].results[0].failed
    assert read.variants["a"].bench == {"rounds": 3}
    assert read.variants["a"].prompt_accuracy == 0.0
    assert read.baselines == pytorch


def test_what_a_build_says_of_a_gain_stays_until_it_is_measured_again(tmp_path: Path) -> None:
    gain = Gain(pays=True, speed=2.0, rounds=3, seconds=1.0, baseline_seconds=2.0)
    first = VariantGain(against="fp32", components={"unet": gain}, picture=gain, threads=2)
    update_evidence(tmp_path, evidence(a=VariantEvidence(gain=first)))
    path = update_evidence(tmp_path, evidence(a=VariantEvidence(results=(result("passed"),))))
    assert read_evidence(path).variants["a"].gain == first
    second = VariantGain(deferred="gone")
    update_evidence(tmp_path, evidence(a=VariantEvidence(gain=second)))
    assert read_evidence(path).variants["a"].gain == second


def test_evidence_of_the_first_version_is_read(tmp_path: Path) -> None:
    path = update_evidence(tmp_path, evidence(a=VariantEvidence()))
    old = json.loads(path.read_text())
    old["schema"] = "diffoundry.evidence/1.0"
    del old["baselines"], old["variants"]["a"]["bench"], old["variants"]["a"]["prompt_accuracy"]
    path.write_text(json.dumps(old))
    read = read_evidence(path)
    assert read.variants["a"].bench is None and read.baselines == {}


def test_evidence_of_another_manifest_is_not_kept(tmp_path: Path) -> None:
    update_evidence(tmp_path, evidence(sha256_bytes(b"old"), a=VariantEvidence()))
    path = update_evidence(tmp_path, evidence(b=VariantEvidence()))
    assert set(read_evidence(path).variants) == {"b"}


def test_unreadable_evidence_is_refused_by_readers_and_replaced_by_writers(tmp_path: Path) -> None:
    path = evidence_path(tmp_path)
    path.parent.mkdir()
    for text in ("{", "[]", '{"schema": "diffoundry.evidence/2.0"}', "{}"):
        path.write_text(text)
        with pytest.raises(BundleError):
            read_evidence(path)
    update_evidence(tmp_path, evidence(a=VariantEvidence()))
    assert set(read_evidence(path).variants) == {"a"}


def test_evidence_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "evidence").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="link"):
        update_evidence(tmp_path / "bundle", evidence())
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("cannot read /home/me/.cache/x/model.onnx: gone", "cannot read …/model.onnx: gone"),
        ("at 'C:\\Users\\me\\model.onnx'", "at '…/model.onnx'"),
        ("~/a/b", "…/b"),
        ("height/8 is 1/2", "height/8 is 1/2"),
    ],
)
def test_folders_of_this_machine_are_cut_from_messages(text: str, short: str) -> None:
    assert without_folders({"a": [text]}) == {"a": [short]}
    made = evidence(a=VariantEvidence(results=(result("failed", text),)))
    assert (
        json.loads(made.to_json())["variants"]["a"]["results"][0]["checks"][0]["message"] == short
    )
