"""The check stage: opens by the runtime's name, writes its result, never raises a failed parity."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffoundry.errors import ArtifactError, DeferredError, DiffoundryError, MissingToolError
from diffoundry.formats import canonical, parity_result, recording
from diffoundry.parity import table
from diffoundry.stages import check_component as stage_module
from diffoundry.stages.check_component import CheckComponent
from diffoundry.types import Artifact, ArtifactType, Limits, ParityResult, StageContext
from tests.core import stand_ins
from tests.core.parity import fakes
from tests.core.stand_ins import Elsewhere


class FakeRuntime:
    """Opens the session that it was given, or one by the artifact's folder name."""

    tools = ()
    extra = "onnx"

    def __init__(self, sessions, problem=None):
        self.sessions = sessions
        self.problem = problem
        self.opened = []

    def accepts(self, artifact_type):
        return artifact_type.kind == "onnx"

    def unavailable(self, device):
        return self.problem

    def open(self, artifact, contract, device, threads=0):
        self.opened.append((artifact.path.name, device, threads))
        return self.sessions[artifact.path.name]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    folder = tmp_path / "recording"
    recording.save(fakes.make_recording(), folder)
    return {
        "engine": engine(tmp_path, "engine", "fp32"),
        "recording": Artifact(ArtifactType("recording"), folder, "sha256:1", "unet"),
    }


def engine(tmp_path: Path, name: str, precision) -> Artifact:
    return Artifact(ArtifactType("onnx", precision), tmp_path / name, "sha256:0", "unet")


def run(
    monkeypatch, tmp_path: Path, inputs, runtime: FakeRuntime, **options
) -> tuple[ParityResult, list[str]]:
    monkeypatch.setattr(stage_module, "runtime_named", lambda name: runtime)
    work = tmp_path / "work"
    work.mkdir()
    said: list[str] = []
    context = StageContext(work, "unet", fakes.CONTRACT, threads=3, say=said.append)
    produced = CheckComponent(**options).run(inputs, context)
    path = produced["parity_result"].path
    parity_result.validate(path)
    return parity_result.load(path), said


def test_a_right_engine_passes_with_the_builds_threads(monkeypatch, tmp_path, inputs):
    runtime = FakeRuntime({"engine": fakes.FakeSession()})
    result, said = run(monkeypatch, tmp_path, inputs, runtime, device="cpu")
    assert result.passed and result.subject == "unet"
    assert runtime.opened == [("engine", "cpu", 3)]
    assert said == [f"unet: passed, {len(result.checks)} checks"]


def test_a_failed_parity_is_a_result_not_an_error(monkeypatch, tmp_path, inputs):
    wrong = fakes.FakeSession(spoil=lambda out, _: {k: v + 1 for k, v in out.items()})
    result, said = run(monkeypatch, tmp_path, inputs, FakeRuntime({"engine": wrong}))
    assert result.failed
    assert "failed" in said[0]


def test_limits_are_options(monkeypatch, tmp_path, inputs):
    near = fakes.FakeSession(spoil=lambda out, _: {k: v + 1e-4 for k, v in out.items()})
    wide = Limits(max_abs=1e-3)
    result, _ = run(monkeypatch, tmp_path, inputs, FakeRuntime({"engine": near}), call_limits=wide)
    assert result.passed


def test_options_survive_the_worker_process_as_json():
    options = {"runtime": "x", "device": "cuda", "call_limits": canonical.plain(Limits(cosine=0.9))}
    stage = canonical.parse(CheckComponent, options)
    assert stage == CheckComponent("x", "cuda", call_limits=Limits(cosine=0.9))


def test_the_reference_engine_proves_what_fp16_cannot_show(monkeypatch, tmp_path, inputs):
    recorded = fakes.make_recording()
    base = recorded.calls[0]
    small = fakes.make_swap(base, "timestep_cond", base.feeds["timestep_cond"] + 1e-3)
    others = tuple(s for s in recorded.swaps if s.input != "timestep_cond")
    folder = tmp_path / "small"
    recording.save(dataclasses.replace(recorded, swaps=(*others, small)), folder)
    inputs = {
        "engine": engine(tmp_path, "half", "fp16"),
        "reference_engine": engine(tmp_path, "single", "fp32"),
        "recording": Artifact(ArtifactType("recording"), folder, "sha256:1"),
    }
    sessions = {"half": fakes.FakeSession(dtype="float16"), "single": fakes.FakeSession()}
    result, _ = run(monkeypatch, tmp_path, inputs, FakeRuntime(sessions))
    assert result.passed
    assert any("proven on the fp32 engine" in check.message for check in result.checks)


def test_a_host_that_cannot_run_the_engine_defers_the_check(monkeypatch, tmp_path, inputs):
    runtime = FakeRuntime({}, DeferredError("CUDA", found="no driver"))
    result, _ = run(monkeypatch, tmp_path, inputs, runtime)
    assert [check.status for check in result.checks] == ["deferred"]
    assert "no driver" in result.checks[0].message


def test_an_engine_of_a_kind_the_runtime_does_not_take_has_failed(monkeypatch, tmp_path, inputs):
    inputs["engine"] = dataclasses.replace(inputs["engine"], type=ArtifactType("tflite"))
    result, _ = run(monkeypatch, tmp_path, inputs, FakeRuntime({}))
    assert result.failed and "cannot open" in result.checks[0].message


def test_a_damaged_recording_is_an_error(monkeypatch, tmp_path, inputs):
    (inputs["recording"].path / recording.STRUCTURE_FILE).write_text("{}")
    with pytest.raises(ArtifactError):
        run(monkeypatch, tmp_path, inputs, FakeRuntime({"engine": fakes.FakeSession()}))


def test_an_unknown_runtime_is_an_error(tmp_path, inputs):
    with pytest.raises(DiffoundryError, match="nonsense"):
        CheckComponent(runtime="nonsense").run(inputs, StageContext(tmp_path))


def stand_in(monkeypatch, tmp_path, inputs, understudy, **native):
    monkeypatch.setattr(
        stage_module, "runtime_named", stand_ins.named(Elsewhere(understudy, **native), understudy)
    )
    context = StageContext(tmp_path, "unet", fakes.CONTRACT)
    produced = CheckComponent(runtime=stand_ins.NATIVE).run(inputs, context)
    return parity_result.load(produced["parity_result"].path)


def test_a_stand_in_runs_every_check_and_the_native_one_stays_deferred(
    monkeypatch, tmp_path, inputs
):
    runtime = FakeRuntime({"engine": fakes.FakeSession()})
    result = stand_in(monkeypatch, tmp_path, inputs, runtime)
    first, *others = result.checks
    assert (first.level, first.name, first.status) == ("device", stand_ins.NATIVE, "deferred")
    assert stand_ins.NOTE in first.message and "verify --complete" in first.message
    assert first.values["stand_in"] == stand_ins.UNDERSTUDY
    assert {check.level for check in others} >= {"call", "nothing_dropped", "shape_range"}
    assert all(check.status in ("passed", "info") for check in others)
    assert not result.passed and not result.failed
    assert table.summary(result) == (
        f"unet: {len(others)} checks passed by {stand_ins.UNDERSTUDY}, 1 deferred"
    )
    assert stand_ins.UNDERSTUDY in table.rows([result])[0][2]


def test_a_stand_in_that_fails_fails_the_engine(monkeypatch, tmp_path, inputs):
    wrong = fakes.FakeSession(spoil=lambda out, _: {k: v + 1 for k, v in out.items()})
    result = stand_in(monkeypatch, tmp_path, inputs, FakeRuntime({"engine": wrong}))
    assert result.failed and "failed" in table.summary(result)


def test_a_stand_in_that_cannot_run_defers_everything(monkeypatch, tmp_path, inputs):
    problem = MissingToolError("torch", remedy="pip install torch")
    result = stand_in(monkeypatch, tmp_path, inputs, FakeRuntime({}, problem))
    assert [check.status for check in result.checks] == ["deferred"]
    assert "pip install torch" in result.checks[0].message


def test_where_the_native_runtime_is_here_nothing_is_deferred(monkeypatch, tmp_path, inputs):
    runtime = FakeRuntime({"engine": fakes.FakeSession()})
    result = stand_in(monkeypatch, tmp_path, inputs, runtime, problem=None)
    assert result.passed and "device" not in {check.level for check in result.checks}


def test_the_reference_engine_is_opened_by_the_stand_in_too(monkeypatch, tmp_path, inputs):
    inputs["reference_engine"] = engine(tmp_path, "single", "fp32")
    inputs["engine"] = engine(tmp_path, "half", "fp16")
    sessions = {"half": fakes.FakeSession(dtype="float16"), "single": fakes.FakeSession()}
    result = stand_in(monkeypatch, tmp_path, inputs, FakeRuntime(sessions))
    assert not result.failed
    assert [c.status for c in result.checks if c.status not in ("passed", "info")] == ["deferred"]
