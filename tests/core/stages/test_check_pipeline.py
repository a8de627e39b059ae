"""The pipeline's check stage on a real mini pipeline's files, with sessions of numpy functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import DeferredError
from diffoundry.formats import canonical, parity_result, recording, step_table
from diffoundry.formats.recording import PipelineRecording, Trajectory
from diffoundry.generation import PICTURE_COMPONENTS, TextToImage
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.stages import check_pipeline as stage_module
from diffoundry.stages.check_pipeline import CheckPipeline
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Axis,
    Contract,
    Limits,
    ParityResult,
    StageContext,
)
from tests.core import stand_ins
from tests.mini_pipelines import PIPELINES, make_pipeline


class Component:
    """Outputs that depend on every input, in the shapes of the contract."""

    def __init__(self, contract: Contract, factor: float = 1.0) -> None:
        self.contract = contract
        self.factor = factor
        self.closed = False

    def infer(self, feeds):
        shape = self.contract.check_feeds(feeds)
        mean = np.float32(sum(np.tanh(array).mean() for array in feeds.values()))
        outputs = {}
        for spec in self.contract.outputs:
            size = spec.shape(shape)
            grid = np.arange(np.prod(size), dtype=np.float32).reshape(size)
            outputs[spec.name] = (np.sin(grid + mean) * self.factor).astype(np.float32)
        return outputs

    def probe(self, feeds, names=None):
        return {}

    def precision_used(self):
        return {"compute": "fp32"}

    def close(self):
        self.closed = True


class FakeRuntime:
    tools = ()
    extra = "onnx"

    def __init__(self, problem=None, factors=None):
        self.problem = problem
        self.factors = factors or {}
        self.opened: list[Component] = []

    def accepts(self, artifact_type):
        return True

    def unavailable(self, device):
        return self.problem

    def open(self, artifact, contract, device, threads=0):
        if artifact.component == "broken":
            raise RuntimeError("corrupt file")
        factor = self.factors.get(contract.component, 1.0)
        self.opened.append(Component(contract, factor))
        return self.opened[-1]


class Setting:
    """A mini pipeline's files, contracts, step tables and one trajectory."""

    def __init__(self, folder: Path) -> None:
        model = folder / "model"
        make_pipeline(model, **PIPELINES["lcm"])
        source = open_pipeline(model)
        height, width = source.geometry.native_height_pixels, source.geometry.native_width_pixels
        step = source.geometry.pixel_multiple_of
        axes = (
            Axis("batch", 1, 1, 1),
            Axis("height", height, height, height, step),
            Axis("width", width, width, width, step),
        )
        self.contracts = {name: contract_for(source, name, axes) for name in PICTURE_COMPONENTS}
        tables = folder / "tables"
        tables.mkdir()
        step_table.save(step_table.SchedulerTables("lcm", True, {2: _table()}), tables)
        recording.save(self._record(source, tables, height, width), folder / "recording")
        places = {
            "pipeline_files": model,
            "step_tables": tables,
            "recording": folder / "recording",
            **dict.fromkeys(PICTURE_COMPONENTS, folder),
        }
        self.inputs = {
            name: Artifact(ArtifactType(name if name in places else "onnx"), path, "sha256:0", name)
            for name, path in places.items()
        }

    def _record(self, source, tables, height, width) -> PipelineRecording:
        sessions = {name: Component(contract) for name, contract in self.contracts.items()}
        pipeline = TextToImage(
            sessions,
            Tokenizer.open(source.tokenizer_path, source.geometry.tokens),
            step_table.open_tables(tables),
            source.geometry,
        )
        latent = self.contracts["vae_decoder"].inputs[0]
        shape = {"batch": 1, "height": height, "width": width}
        draw = np.random.default_rng(0)
        initial = draw.standard_normal(latent.shape(shape)).astype(np.float32)
        final = pipeline.denoise("a cat", steps=2, guidance=3.0, initial_latents=initial)
        image = pipeline.decode(final)
        one = Trajectory("a cat", "", 0, "lcm", 2, 3.0, shape, initial, None, final, image)
        return PipelineRecording((one,), "evaluation")


def _table() -> step_table.StepTable:
    ones = np.ones(2, np.float32)
    columns = ones[:, None]
    return step_table.StepTable(
        "lcm", 2, 1.0, 100 * ones, ones, 0.8 * columns, -0.3 * columns, 0 * ones
    )


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("pipeline"))


def run(monkeypatch, tmp_path, setting, runtime, inputs=None, **options) -> ParityResult:
    monkeypatch.setattr(stage_module, "runtime_named", lambda name: runtime)
    context = StageContext(tmp_path, contracts=setting.contracts)
    produced = CheckPipeline(**options).run(inputs or setting.inputs, context)
    return parity_result.load(produced["parity_result"].path)


def test_right_engines_pass(monkeypatch, tmp_path, setting):
    runtime = FakeRuntime()
    result = run(monkeypatch, tmp_path, setting, runtime)
    assert result.passed, result.checks
    assert [check.level for check in result.checks] == ["trajectory", "image", "image"]
    assert len(runtime.opened) == 3 and all(session.closed for session in runtime.opened)


def test_a_wrong_engine_is_a_failed_result(monkeypatch, tmp_path, setting):
    result = run(monkeypatch, tmp_path, setting, FakeRuntime(factors={"unet": 1.05}))
    assert result.failed


def test_limits_are_options(monkeypatch, tmp_path, setting):
    wide = {"trajectory_limits": Limits(max_abs=9.0), "image_limits": Limits(psnr_db=1.0)}
    runtime = FakeRuntime(factors={"unet": 1.01})
    assert run(monkeypatch, tmp_path, setting, runtime, **wide).passed


def test_a_host_that_cannot_run_the_engines_defers_the_check(monkeypatch, tmp_path, setting):
    result = run(monkeypatch, tmp_path, setting, FakeRuntime(DeferredError("no driver")))
    assert [check.status for check in result.checks] == ["deferred"]


def test_an_engine_that_does_not_open_fails_and_the_opened_ones_are_closed(
    monkeypatch, tmp_path, setting
):
    bad = Artifact(ArtifactType("onnx"), tmp_path, "sha256:0", "broken")
    runtime = FakeRuntime()
    result = run(monkeypatch, tmp_path, setting, runtime, {**setting.inputs, "vae_decoder": bad})
    assert result.failed and "corrupt file" in result.checks[0].message
    assert len(runtime.opened) == 2 and all(session.closed for session in runtime.opened)


def test_options_survive_the_worker_process_as_json():
    stage = CheckPipeline(trajectory_limits=Limits(psnr_db=35.0))
    options = canonical.plain({"trajectory_limits": stage.trajectory_limits})
    assert canonical.parse(CheckPipeline, options) == stage


def test_a_stand_in_plays_the_trajectories_and_the_native_check_stays_deferred(
    monkeypatch, tmp_path, setting
):
    for factors, statuses in (
        ({}, ["deferred", "passed", "passed"]),
        ({"unet": 1.05}, ["deferred", "failed"]),
    ):
        runtime = FakeRuntime(factors=factors)
        native = stand_ins.Elsewhere(runtime, kinds=PICTURE_COMPONENTS)
        lookup = stand_ins.named(native, runtime)
        monkeypatch.setattr(stage_module, "runtime_named", lookup)
        context = StageContext(tmp_path, contracts=setting.contracts)
        produced = CheckPipeline(runtime=stand_ins.NATIVE).run(setting.inputs, context)
        result = parity_result.load(produced["parity_result"].path)
        assert [check.status for check in result.checks][: len(statuses)] == statuses
        assert result.failed == bool(factors) and not result.passed
        assert stand_ins.NOTE in result.checks[0].message
        assert all(session.closed for session in runtime.opened)
