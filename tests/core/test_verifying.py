"""`verify`: intact bundles pass; damage, foreign engines and what cannot run here never do."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest

from diffoundry import choosing, verifying
from diffoundry.artifacts.content import CompressionContent
from diffoundry.artifacts.evidence import (
    VariantEvidence,
    evidence_path,
    new_evidence,
    read_evidence,
)
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.errors import (
    ArtifactError,
    BundleError,
    DeferredError,
    ExitCode,
    MissingToolError,
    StageError,
    UsageError,
)
from diffoundry.formats import recording, simulation
from diffoundry.formats.canonical import canonical_json, sha256_bytes, sha256_file
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.types import CheckResult, Limits, ParityResult
from diffoundry.verifying import verify, write_junit
from tests.artifacts.working_bundle import VARIANT, working_content
from tests.core import stand_ins
from tests.core.stand_ins import Elsewhere


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines that run, and beside it one of another model."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, seed in (("bundle", 0), ("other", 100)):
        write_bundle(folder / name, working_content(folder / f"{name}-parts", seed))
    return folder


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


def write_lossy(folder: Path, off: float) -> Path:
    """The same engines as an INT8 variant whose simulation says that the original is `off` away."""
    content = working_content(folder / "parts")
    (variant,) = content.variants
    records, int8 = {}, {}
    for name, engine in variant.engines.items():
        recorded = recording.load_component(content.golden[name])
        answers = [
            tuple({o: v + np.float32(off) for o, v in call.outputs.items()} for call in calls)
            for calls in (recorded.calls, recorded.shape_calls)
        ]
        target = folder / "simulations" / name
        simulation.save(simulation.Simulation("sha256:0", *answers), target)
        records[name] = CompressionContent(simulation=target)
        artifact_type = dataclasses.replace(engine.type, precision="int8")
        int8[name] = dataclasses.replace(engine, type=artifact_type)
    lossy = dataclasses.replace(
        variant,
        precision="int8",
        engines=int8,
        limits={**variant.limits, "drift": Limits(sqnr_db=20)},
        compression=records,
    )
    content = dataclasses.replace(content, variants=(lossy,))
    return write_bundle(folder / "bundle", content).bundle.path


def test_a_lossy_variant_is_held_to_its_drift_and_to_its_simulation(tmp_path: Path) -> None:
    path = write_lossy(tmp_path, off=0.1)
    report = verify(path)
    component, *_ = report.variants[0].results
    drifts = [check for check in component.checks if check.level == "drift"]
    assert drifts and {check.status for check in drifts} == {"passed"}
    calls = [check for check in component.checks if check.level == "call"]
    assert calls and all("simulation_sqnr_db" in check.values for check in calls)


def test_a_damaged_simulation_is_a_failure(tmp_path: Path) -> None:
    path = write_lossy(tmp_path, off=0.0)
    (file,) = path.glob("compression/*/unet/simulation/tensors.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    report = verify(path)
    assert report.exit_code == ExitCode.FAILED and report.variants == ()


def failures(report: verifying.VerifyReport) -> list[str]:
    return [
        f"{result.subject}/{check.level}"
        for result in report.results
        for check in result.checks
        if check.status == "failed"
    ]


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def fix_digests(bundle: Path) -> None:
    """Make the manifest agree with the files, as a forger would."""

    def change(data: dict[str, Any]) -> None:
        for name, record in data["files"].items():
            record["digest"] = sha256_file(bundle / name)
            record["size_bytes"] = (bundle / name).stat().st_size
        for variant in data["variants"]:
            for engine in variant["engines"].values():
                prefix = engine["path"] + "/"
                listing = {
                    name.removeprefix(prefix): record["digest"]
                    for name, record in data["files"].items()
                    if name.startswith(prefix)
                }
                engine["digest"] = sha256_bytes(canonical_json(listing))

    edit_manifest(bundle, change)


def test_an_intact_bundle_passes_at_every_level(bundle: Path) -> None:
    lines: list[str] = []
    report = verify(bundle, say=lines.append)
    assert report.exit_code == ExitCode.DONE, failures(report)
    assert [result.subject for result in report.results] == [
        "files",
        "text_encoder",
        "unet",
        "vae_decoder",
        "pipeline",
    ]
    levels = {check.level for result in report.results for check in result.checks}
    assert {"files", "call", "trajectory", "image", "nothing_dropped", "shape_range"} <= levels
    assert {"sick_numbers", "precision"} <= levels
    assert lines[0] == "checking digests" and f"{VARIANT}: unet" in lines
    assert report.evidence is None and not (bundle / "evidence" / "x").exists()


def test_verifying_imports_no_torch(bundle: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from diffoundry.verifying import verify; "
        "report = verify(Path(sys.argv[1])); "
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "sys.exit(f'{report.exit_code!r} {heavy}' if heavy or report.exit_code else 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("part", ["engines", "golden", "steps", "tokenizer"])
def test_one_flipped_byte_fails_before_any_engine_is_opened(
    bundle: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted(path for path in (bundle / part).rglob("*") if path.is_file())[0]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    monkeypatch.setattr(verifying, "opening_of", None)
    report = verify(bundle)
    assert report.exit_code == ExitCode.FAILED and report.variants == ()
    (check,) = report.files.checks
    assert check.message.startswith(file.relative_to(bundle).as_posix())


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_an_engine_of_another_model_fails_parity_even_with_digests_fixed_up(
    built: Path, bundle: Path, component: str
) -> None:
    place = Path("engines") / VARIANT / component / "model.onnx"
    shutil.copyfile(built / "other" / place, bundle / place)
    assert verify(bundle).exit_code == ExitCode.FAILED
    assert not verify(bundle).variants
    fix_digests(bundle)
    report = verify(bundle)
    assert report.files.passed
    assert report.exit_code == ExitCode.FAILED
    assert f"{component}/call" in failures(report)
    assert "pipeline/trajectory" in failures(report) or component == "vae_decoder"
    assert "pipeline/image" in failures(report)


def test_golden_vectors_of_another_component_prove_nothing(bundle: Path) -> None:
    shutil.rmtree(bundle / "golden" / "unet")
    shutil.copytree(bundle / "golden" / "vae_decoder", bundle / "golden" / "unet")
    fix_digests(bundle)
    assert "unet/open" in failures(verify(bundle))


def test_a_recording_that_lost_its_calls_proves_nothing(bundle: Path) -> None:
    import dataclasses

    folder = bundle / "golden" / "unet"
    recorded = recording.load_component(folder)
    shutil.rmtree(folder)
    recording.save(dataclasses.replace(recorded, calls=(), swaps=()), folder)
    fix_digests(bundle)
    assert "unet/call" in failures(verify(bundle))


def test_missing_golden_vectors_fail(bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data["golden"].pop("unet"))
    assert failures(verify(bundle)) == ["unet/open"]


def test_an_engine_that_is_not_there_fails_the_pipeline(bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data["variants"][0]["engines"].pop("unet"))
    report = verify(bundle)
    assert report.exit_code == ExitCode.FAILED
    assert any(name.startswith("pipeline/") for name in failures(report))


def test_a_bundle_that_cannot_be_trusted_is_a_failed_report(bundle: Path) -> None:
    (bundle / "link").symlink_to(bundle / "README.md")
    assert verify(bundle).exit_code == ExitCode.FAILED
    (bundle / "link").unlink()
    edit_manifest(bundle, lambda data: data.update(schema="diffoundry.bundle/2.0"))
    report = verify(bundle)
    assert report.exit_code == ExitCode.FAILED
    assert "upgrade" in report.files.checks[0].message


def test_no_such_folder_and_no_such_variant_are_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verify(tmp_path / "none")
    with pytest.raises(BundleError, match=VARIANT):
        verify(bundle, variant="tflite")


def test_what_only_the_target_host_has_is_deferred_and_never_a_pass(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = DeferredError("onnx_session", expected="a GPU", found="none")
    monkeypatch.setattr(verifying, "runtime_problem", lambda variant: problem)
    report = verify(bundle)
    assert report.exit_code == ExitCode.DEFERRED
    assert {result.subject for result in report.results} == {
        "files",
        "text_encoder",
        "unet",
        "vae_decoder",
        "pipeline",
    }
    assert not any(result.passed for result in report.results[1:])
    assert verify(bundle, allow_deferred=True).exit_code == ExitCode.DONE


def runtimes(monkeypatch: pytest.MonkeyPatch, native: Elsewhere, understudy: Any = None) -> None:
    lookup = stand_ins.named(native, understudy or native.understudy)
    monkeypatch.setattr(choosing, "runtime_named", lookup)


def test_a_stand_in_runs_every_level_and_the_native_check_stays_deferred(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes(monkeypatch, Elsewhere(OnnxSession()))
    lines: list[str] = []
    report = verify(bundle, say=lines.append, complete=True)
    assert report.exit_code == ExitCode.DEFERRED, failures(report)
    assert any(f"(by {stand_ins.UNDERSTUDY}" in line for line in lines)
    levels = {check.level for result in report.results for check in result.checks}
    assert {"device", "call", "trajectory", "image", "nothing_dropped"} <= levels
    for result in report.results[1:]:
        deferred = [check for check in result.checks if check.status == "deferred"]
        assert [check.level for check in deferred] == ["device"]
    assert verify(bundle, allow_deferred=True).exit_code == ExitCode.DONE
    # What the stand-in did settles nothing; the host that has the runtime does.
    assert read_evidence(evidence_path(bundle)).variants[VARIANT].completed == ()
    shutil.copyfile(evidence_path(bundle), bundle / "evidence" / "elsewhere.json")
    runtimes(monkeypatch, Elsewhere(OnnxSession(), problem=None))
    assert verify(bundle, complete=True).exit_code == ExitCode.DONE
    completed = read_evidence(evidence_path(bundle)).variants[VARIANT].completed
    assert set(completed) == {"text_encoder", "unet", "vae_decoder", "pipeline"}


def test_a_stand_in_that_fails_fails_the_variant(
    built: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path("engines") / VARIANT / "unet" / "model.onnx"
    shutil.copyfile(built / "other" / place, bundle / place)
    fix_digests(bundle)
    runtimes(monkeypatch, Elsewhere(OnnxSession()))
    report = verify(bundle, allow_deferred=True)
    assert report.exit_code == ExitCode.FAILED and "unet/call" in failures(report)


def test_a_stand_in_that_is_missing_defers_everything_and_says_what_it_needs(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Elsewhere(OnnxSession(), MissingToolError("torch", remedy="pip install torch"))
    runtimes(monkeypatch, Elsewhere(OnnxSession()), absent)
    report = verify(bundle)
    assert report.exit_code == ExitCode.DEFERRED
    checks = [check for result in report.results[1:] for check in result.checks]
    assert {check.status for check in checks} == {"deferred"}
    assert "pip install torch" in checks[0].message


def test_a_damaged_engine_is_not_deferred(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = ArtifactError("engine", found="truncated")
    runtimes(monkeypatch, Elsewhere(OnnxSession(), damaged=damaged))
    report = verify(bundle, allow_deferred=True)
    assert report.exit_code == ExitCode.FAILED
    assert "unet/open" in failures(report)


def test_allow_deferred_does_not_excuse_damage(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = DeferredError("onnx_session")
    monkeypatch.setattr(verifying, "runtime_problem", lambda variant: problem)
    (bundle / "README.md").write_text("")
    assert verify(bundle, allow_deferred=True).exit_code == ExitCode.FAILED


def test_a_missing_tool_exits_3_and_names_the_install_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = MissingToolError("onnxruntime", remedy='pip install "diffoundry[onnx]"')
    monkeypatch.setattr(verifying, "runtime_problem", lambda variant: problem)
    report = verify(bundle, allow_deferred=True)
    assert report.exit_code == ExitCode.MISSING_TOOL
    write_junit(report, tmp_path / "junit.xml")
    (failure,) = Xml.parse(tmp_path / "junit.xml").iter("failure")
    assert "diffoundry[onnx]" in (failure.text or "")


def test_complete_writes_what_ran_here_and_which_deferred_checks_it_settles(
    bundle: Path,
) -> None:
    report = verify(bundle)
    waiting = ParityResult("unet", (CheckResult("open", "open", "deferred", "unet"),))
    builder = new_evidence(report.digest, {VARIANT: VariantEvidence(results=(waiting,))})
    (bundle / "evidence" / "builder.json").write_text(builder.to_json())
    (bundle / "evidence" / "broken.json").write_text("{")
    done = verify(bundle, complete=True)
    assert done.evidence == evidence_path(bundle)
    evidence = read_evidence(evidence_path(bundle))
    assert evidence.manifest_digest == report.digest
    found = evidence.variants[VARIANT]
    assert found.completed == ("unet",)
    assert all(result.passed for result in found.results)
    assert found.precision_used["unet"]
    assert verify(bundle).exit_code == ExitCode.DONE


def test_a_deferred_check_that_fails_here_is_not_completed(built: Path, bundle: Path) -> None:
    place = Path("engines") / VARIANT / "unet" / "model.onnx"
    shutil.copyfile(built / "other" / place, bundle / place)
    fix_digests(bundle)
    waiting = ParityResult("unet", (CheckResult("open", "open", "deferred", "unet"),))
    builder = new_evidence(
        sha256_file(bundle / "manifest.json"), {VARIANT: VariantEvidence(results=(waiting,))}
    )
    (bundle / "evidence" / "builder.json").write_text(builder.to_json())
    report = verify(bundle, complete=True)
    assert report.exit_code == ExitCode.FAILED
    assert read_evidence(evidence_path(bundle)).variants[VARIANT].completed == ()


def test_a_full_disk_while_writing_evidence_is_said_in_words(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verifying, "update_evidence", full)
    with pytest.raises(StageError, match="disk is full"):
        verify(bundle, complete=True)


def test_junit_has_one_case_a_check_with_failures_and_skips(
    built: Path, bundle: Path, tmp_path: Path
) -> None:
    place = Path("engines") / VARIANT / "unet" / "model.onnx"
    shutil.copyfile(built / "other" / place, bundle / place)
    fix_digests(bundle)
    report = verify(bundle)
    write_junit(report, tmp_path / "new" / "junit.xml")
    root = Xml.parse(tmp_path / "new" / "junit.xml").getroot()
    checks = [check for result in report.results for check in result.checks]
    assert int(root.get("tests", "0")) == len(checks) == len(list(root.iter("testcase")))
    failed = sum(check.status == "failed" for check in checks)
    assert int(root.get("failures", "0")) == failed > 0
    assert [suite.get("name") for suite in root] == ["files", VARIANT]
    assert any("max_abs" in (failure.text or "") for failure in root.iter("failure"))


def test_junit_to_a_place_that_cannot_be_written_is_a_usage_error(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (bundle / "README.md").write_text("")
    with pytest.raises(UsageError, match="--junit"):
        write_junit(verify(bundle), tmp_path / "file" / "junit.xml")
