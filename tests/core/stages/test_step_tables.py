"""The stage writes the tables of every scheduler that fits the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffoundry.errors import ModelError
from diffoundry.formats import step_table
from diffoundry.stages.step_tables import StepTables
from diffoundry.types import Artifact, ArtifactType, Stage, StageContext
from tests.mini_pipelines import make_named


def run(pipeline: Path, work: Path, said: list[str] | None = None) -> Path:
    stage = StepTables()
    assert isinstance(stage, Stage)
    work.mkdir()
    source = Artifact(ArtifactType("pipeline_files"), pipeline, "sha256:0")
    context = StageContext(work, say=(said if said is not None else []).append)
    produced = stage.run({"pipeline_files": source}, context)
    assert set(produced) == set(stage.outputs())
    return produced["step_tables"].path


def change_scheduler(pipeline: Path, **settings: Any) -> None:
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_named(tmp_path_factory.mktemp("lcm"), "lcm")


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return make_named(tmp_path / "sd", "sd")


def test_an_lcm_gets_lcm_and_tcd_for_one_to_eight_steps_byte_equal_each_time(
    lcm: Path, tmp_path: Path
) -> None:
    folder = run(lcm, tmp_path / "one")
    step_table.validate(folder)
    tables = step_table.open_tables(folder)
    assert tables.schedulers == ("lcm", "tcd")
    assert tables.counts("lcm") == tables.counts("tcd") == tuple(range(1, 9))
    assert step_table.digest(folder) == step_table.digest(run(lcm, tmp_path / "two"))


def test_a_stable_diffusion_pipeline_gets_seven_schedulers_its_own_first(
    sd: Path, tmp_path: Path
) -> None:
    tables = step_table.open_tables(run(sd, tmp_path / "work"))
    assert tables.schedulers[0] == "pndm"
    assert len(tables.schedulers) == 7
    assert all(tables.counts(name) == tuple(range(1, 51)) for name in tables.schedulers)


def test_a_scheduler_that_cannot_run_the_model_is_left_out_aloud(sd: Path, tmp_path: Path) -> None:
    # PNDM itself knows no thresholding; diffusers hands the setting on to those that do.
    change_scheduler(sd, thresholding=True)
    said: list[str] = []
    tables = step_table.open_tables(run(sd, tmp_path / "work", said))
    assert "ddim" not in tables.schedulers and "pndm" in tables.schedulers
    assert any("ddim" in line and "thresholding" in line for line in said)


def test_a_default_scheduler_that_clips_fails_the_stage(lcm: Path, tmp_path: Path) -> None:
    pipeline = make_named(tmp_path / "lcm", "lcm")
    change_scheduler(pipeline, clip_sample=True)
    with pytest.raises(ModelError, match="clip_sample"):
        run(pipeline, tmp_path / "work")
