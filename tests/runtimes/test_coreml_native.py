"""Core ML's own runtime: deferred where there is no Mac, with the interpreter as its stand-in."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.discovery import runtime_named
from diffoundry.errors import ArtifactError, ContractError, DeferredError, MissingToolError
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.formats import mlpackage
from diffoundry.runtimes import coreml_native
from diffoundry.runtimes.coreml_native import STAND_IN, UNITS, CoremlNative
from diffoundry.sessions import choose_opening
from diffoundry.types import Artifact, ArtifactType, HasStandIn
from tests.exporters import tiny_coreml as tiny
from tests.exporters.tiny_tflite import CONTRACT, USUAL

STAGE = CoremlFromExportedProgram(precision="fp16")
SEVERAL = CoremlFromExportedProgram(
    precision="fp16",
    shape_policy=tiny.policy((1, 16, 16), (2, 16, 16)),
    deployment_target="iOS18",
)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has Core ML")
def test_without_a_mac_every_device_is_deferred_and_the_remedy_said() -> None:
    for device in UNITS:
        problem = CoremlNative().unavailable(device)
        assert isinstance(problem, DeferredError)
        assert "macOS" in problem.expected and "verify --complete" in problem.remedy


def test_on_a_mac_only_the_package_can_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml_native.sys, "platform", "darwin")
    assert CoremlNative().unavailable("all") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = CoremlNative().unavailable("all")
    assert isinstance(problem, MissingToolError) and "diffoundry[coreml]" in problem.remedy


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac needs no stand-in")
def test_the_reference_interpreter_stands_in_and_says_what_that_proves() -> None:
    artifact = tiny.package(STAGE)
    assert isinstance(CoremlNative(), HasStandIn)
    opening = choose_opening(runtime_named, "coreml_native", artifact, CONTRACT, "cpu_ne")
    assert opening.stand_in is not None and opening.stand_in.runtime == STAND_IN
    assert "not on the device" in opening.stand_in.note
    assert "Neural Engine accumulates differently" in opening.stand_in.note
    feeds = tiny.feeds_at(USUAL)
    found, wanted = opening.open().infer(feeds), tiny.reference(feeds)
    assert tiny.psnr_db(wanted["model_output"], found["model_output"]) > 55


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac needs no stand-in")
def test_without_torch_it_is_deferred_and_both_remedies_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    opening = choose_opening(runtime_named, "coreml_native", tiny.package(STAGE), CONTRACT, "all")
    with pytest.raises(DeferredError, match="torch") as caught:
        opening.open()
    assert "on a Mac" in caught.value.remedy and "diffoundry[build]" in caught.value.remedy


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac needs no stand-in")
def test_weights_of_another_model_are_refused_by_the_stand_in_too(tmp_path: Path) -> None:
    artifact = tiny.package(STAGE)
    shutil.copytree(artifact.path, tmp_path / "model")
    damaged = dataclasses.replace(artifact, path=tmp_path / "model")
    weights = mlpackage.package(damaged.path) / mlpackage.DATA / mlpackage.WEIGHT_FILE
    raw = bytearray(weights.read_bytes())
    raw[-200] ^= 1  # every record still fits
    weights.write_bytes(raw)
    with pytest.raises(ArtifactError, match="of another model"):
        choose_opening(runtime_named, "coreml_native", damaged, CONTRACT, "all").open()


def test_an_engine_of_another_kind_is_refused_also_without_a_mac() -> None:
    foreign = Artifact(ArtifactType("onnx"), Path("nowhere"), "")
    with pytest.raises(ArtifactError, match="cannot open"):
        choose_opening(runtime_named, "coreml_native", foreign, CONTRACT, "all").open()


class FakeModel:
    """What coremltools' MLModel is to this runtime."""

    opened: list[dict[str, Any]] = []

    def __init__(self, path: str, **options: Any) -> None:
        FakeModel.opened.append({"path": Path(path).name, **options})

    def predict(self, feeds: dict[str, Any]) -> dict[str, Any]:
        batch = len(feeds["sample"])
        return {
            "model_output": np.ones((batch, 4, 4, 4), np.float32),
            "words": np.zeros((batch, 512), np.float16),
        }


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Core ML were here: this holds how it is called, not what it computes."""
    import coremltools as ct

    for stage in (STAGE, SEVERAL):  # what converts them needs the real one
        tiny.package(stage)
    FakeModel.opened.clear()
    monkeypatch.setattr(coreml_native.sys, "platform", "darwin")
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)


def test_the_device_names_the_compute_units(on_a_mac: None) -> None:
    import coremltools as ct

    artifact = tiny.package(STAGE)
    assert artifact.contract is not None
    session = CoremlNative().open(artifact, artifact.contract, "cpu_ne")
    found = session.infer(tiny.feeds_at(USUAL))
    assert FakeModel.opened == [
        {"path": "unet.mlpackage", "compute_units": ct.ComputeUnit.CPU_AND_NE}
    ]
    assert {name: value.dtype for name, value in found.items()} == {
        "model_output": np.float32,
        "words": np.float32,
    }
    used = session.precision_used()
    assert used["compute"] == ["fp16"] and used["compute_units"] == "CPU_AND_NE"
    with pytest.raises(ContractError, match="probe"):
        session.probe(tiny.feeds_at(USUAL))


def test_a_package_of_several_functions_is_loaded_by_shape_and_only_once(on_a_mac: None) -> None:
    artifact = tiny.package(SEVERAL)
    assert artifact.contract is not None
    session = CoremlNative().open(artifact, artifact.contract, "all")
    for batch in (2, 1, 2):
        session.infer(tiny.feeds_at({**USUAL, "batch": batch}))
    assert [one["function_name"] for one in FakeModel.opened] == [
        "batch_2_height_16_width_16",
        "batch_1_height_16_width_16",
    ]
    with pytest.raises(ContractError, match="one function for each shape"):
        session.infer(tiny.feeds_at({**USUAL, "batch": 3}))


def test_a_damaged_package_is_refused_before_core_ml_sees_it(
    on_a_mac: None, tmp_path: Path
) -> None:
    shutil.copytree(tiny.package(STAGE).path, tmp_path / "model")
    artifact = dataclasses.replace(tiny.package(STAGE), path=tmp_path / "model")
    weights = mlpackage.package(artifact.path) / mlpackage.DATA / mlpackage.WEIGHT_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError):
        CoremlNative().open(artifact, CONTRACT, "all")
    assert FakeModel.opened == []


@pytest.mark.mac
def test_core_ml_computes_the_original() -> None:
    artifact = tiny.package(STAGE)
    assert artifact.contract is not None
    session = CoremlNative().open(artifact, artifact.contract, "cpu")
    feeds = tiny.feeds_at(USUAL)
    found, wanted = session.infer(feeds), tiny.reference(feeds)
    assert all(tiny.psnr_db(wanted[name], found[name]) > 35 for name in wanted)
