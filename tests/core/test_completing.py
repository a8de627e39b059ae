"""`verify --complete` where engines are built on the host: kept beside the evidence, no more.

The host with a GPU is a stand-in here, and so is what it builds: these tests hold our own steps.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.content import BundleContent
from diffoundry.artifacts.evidence import evidence_path, host_name, read_evidence
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.compilers.tensorrt_from_onnx import TensorrtFromOnnx
from diffoundry.errors import ExitCode
from diffoundry.formats import tensorrt_build, tensorrt_engine
from diffoundry.formats.canonical import sha256_file, tree_digest
from diffoundry.runtimes.tensorrt import bindings, driver
from diffoundry.runtimes.tensorrt_engine import TensorrtEngine
from diffoundry.types import Artifact, ArtifactType, ShapePolicy, StageContext
from diffoundry.verifying import VerifyReport, verify
from tests.artifacts.working_bundle import CONTRACTS, working_content
from tests.runtimes.tensorrt import fake_cuda, fake_trt

VARIANT = "tensorrt-fp32"
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def tensorrt_content(parts: Path) -> BundleContent:
    """The hand-made bundle, its engines turned into TensorRT builds."""
    content = working_content(parts)
    builds = {}
    for name, engine in content.variants[0].engines.items():
        work = parts / "builds" / name
        work.mkdir(parents=True)
        context = StageContext(work, name, CONTRACTS[name], threads=1)
        path = TensorrtFromOnnx().run({"model": engine}, context)["build"].path
        kind = ArtifactType("tensorrt_build", "fp32", ShapePolicy())
        builds[name] = Artifact(kind, path, tensorrt_build.digest(path), name)
    variant = dataclasses.replace(
        content.variants[0],
        name=VARIANT,
        runtime="tensorrt_engine",
        device="cuda",
        engines=builds,
        notes=(TensorrtEngine.note,),
    )
    return dataclasses.replace(content, variants=(variant,))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorrt-bundle")
    write_bundle(folder / "bundle", tensorrt_content(folder / "parts"))
    return folder / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle, on a host without a GPU."""
    monkeypatch.setattr(driver, "LIBRARY", "libnosuchdriver.so.1")
    shutil.copytree(built, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Any]:
    """Turns this host into one with a GPU and TensorRT, as far as our code can see."""

    def turn() -> Any:
        fake_trt.now.reset()
        fake_trt.now.layers = fake_trt.layers("Float")
        monkeypatch.setattr(driver, "LIBRARY", str(fake_cuda.library()))
        monkeypatch.setattr(bindings, "load", lambda *versions: fake_trt)
        monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
        return fake_trt

    return turn


def statuses(report: VerifyReport) -> set[str]:
    return {check.status for result in report.results for check in result.checks}


def test_without_a_gpu_everything_but_the_device_itself_is_checked(bundle: Path) -> None:
    report = verify(bundle)
    assert report.exit_code == ExitCode.DEFERRED
    assert statuses(report) == {"passed", "deferred", "info"}
    assert verify(bundle, allow_deferred=True).exit_code == ExitCode.DONE
    levels = {check.level for result in report.results for check in result.checks}
    assert {"device", "call", "trajectory", "image", "shape_range"} <= levels


def test_the_bundle_says_that_no_engine_is_in_it(bundle: Path) -> None:
    text = (bundle / "README.md").read_text(encoding="utf-8")
    assert f"(`{VARIANT}`: by a stand-in, see below)" in text
    assert f"`{VARIANT}`: deferred: the engines are not built here" in text
    unet = (bundle / "engines" / VARIANT / "unet" / "README.md").read_text(encoding="utf-8")
    assert "no engine yet" in unet and "**deferred**" in unet


def test_a_host_with_tensorrt_completes_the_bundle(
    bundle: Path, with_gpu: Callable[[], Any]
) -> None:
    manifest = sha256_file(bundle / "manifest.json")
    assert verify(bundle, complete=True).exit_code == ExitCode.DEFERRED
    assert not (bundle / "evidence" / "engines").exists()
    trt = with_gpu()
    report = verify(bundle, complete=True)
    assert report.exit_code == ExitCode.DONE, statuses(report)
    assert len(trt.now.built) == len(COMPONENTS)
    evidence = read_evidence(evidence_path(bundle)).variants[VARIANT]
    assert set(evidence.completed) == {*COMPONENTS, "pipeline"}
    assert set(evidence.engines) == set(COMPONENTS)
    for component, record in evidence.engines.items():
        assert record.path == f"evidence/engines/{host_name()}/{VARIANT}/{component}"
        folder = bundle / record.path
        assert record.digest == tree_digest(folder) and record.size_bytes > 0
        assert record.built_on["gpu"] == "Fake GPU"
        assert record.built_on["tensorrt"] == trt.__version__
        tensorrt_engine.validate(folder)
    assert sha256_file(bundle / "manifest.json") == manifest
    assert not open_bundle(bundle).verify_files()
    fake_leaks()


def test_without_complete_nothing_is_written(bundle: Path, with_gpu: Callable[[], Any]) -> None:
    with_gpu()
    assert verify(bundle).exit_code == ExitCode.DONE
    assert not (bundle / "evidence" / "engines").exists()


def test_completing_again_builds_nothing_and_replaces_the_copies(
    bundle: Path, with_gpu: Callable[[], Any]
) -> None:
    trt = with_gpu()
    verify(bundle, complete=True)
    stray = bundle / "evidence/engines" / host_name() / VARIANT / "unet" / "stray"
    stray.write_text("x")
    verify(bundle, complete=True)
    assert len(trt.now.built) == len(COMPONENTS)
    assert sorted(path.name for path in stray.parent.iterdir()) == [
        tensorrt_engine.ENGINE_FILE,
        tensorrt_engine.FINGERPRINT_FILE,
    ]
    assert not list(stray.parent.parent.glob(".*"))


def test_an_engine_that_fails_its_check_is_not_kept(
    bundle: Path, with_gpu: Callable[[], Any]
) -> None:
    trt = with_gpu()
    trt.now.layers = trt.layers("Half")  # asked for fp32
    report = verify(bundle, complete=True)
    assert report.exit_code == ExitCode.FAILED
    assert read_evidence(evidence_path(bundle)).variants[VARIANT].engines == {}


def test_what_tensorrt_refuses_fails_with_the_node(
    bundle: Path, with_gpu: Callable[[], Any]
) -> None:
    trt = with_gpu()
    trt.now.parser_errors = [trt.ParserError("/conv/Conv", "Conv", "unsupported")]
    report = verify(bundle, complete=True)
    assert report.exit_code == ExitCode.FAILED
    messages = [check.message for result in report.results for check in result.checks]
    assert any("/conv/Conv (Conv): unsupported" in message for message in messages)


def test_publishing_the_same_bundle_again_keeps_what_a_host_completed(
    bundle: Path, with_gpu: Callable[[], Any], tmp_path: Path
) -> None:
    with_gpu()
    verify(bundle, complete=True)
    before = json.loads(evidence_path(bundle).read_text())["variants"][VARIANT]["engines"]
    (bundle / "README.md").write_text("damaged")
    write_bundle(bundle, tensorrt_content(tmp_path / "parts"))
    after = json.loads(evidence_path(bundle).read_text())["variants"][VARIANT]["engines"]
    assert after == before
    assert all((bundle / record["path"]).is_dir() for record in after.values())


def fake_leaks() -> None:
    assert fake_cuda.count("held") == 0 and fake_cuda.count("contexts") == 0
