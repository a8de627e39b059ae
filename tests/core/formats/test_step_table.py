"""Step tables survive the way to disk, and damage is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import ArtifactError, UsageError
from diffoundry.formats import step_table
from diffoundry.formats.step_table import SchedulerTables, StepTable


def made_up(steps: int, scheduler: str = "pndm") -> StepTable:
    generator = np.random.default_rng(steps)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype="float32")

    calls = steps + 1
    return StepTable(
        scheduler,
        steps,
        1.5 * steps,
        timesteps=draw(calls),
        input_scales=draw(calls),
        noise_coefficients=draw(calls),
        latent_coefficients=draw(calls, 2),
        output_coefficients=draw(calls, min(calls, 4)),
    )


def tables(scheduler: str = "pndm", default: bool = True) -> SchedulerTables:
    return SchedulerTables(
        scheduler,
        default,
        {steps: made_up(steps, scheduler) for steps in (2, 3, 5)},
        settings={"class": "PNDMScheduler", "skip_prk_steps": True},
        left_out={4: "diffusers refuses 4 steps: why not"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    step_table.save(tables(), tmp_path)
    step_table.save(tables("euler", default=False), tmp_path)
    return tmp_path


def test_a_table_comes_back_as_it_was(folder: Path) -> None:
    step_table.validate(folder)
    found = step_table.load(folder / "pndm.safetensors", 3)
    expected = made_up(3)
    assert (found.scheduler, found.steps, found.calls) == ("pndm", 3, 4)
    assert found.init_noise_sigma == 4.5
    for name in ("timesteps", "input_scales", "noise_coefficients"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert np.array_equal(found.latent_coefficients, expected.latent_coefficients)
    assert np.array_equal(found.output_coefficients, expected.output_coefficients)


def test_equal_tables_give_equal_bytes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = tmp_path_factory.mktemp("again")
    step_table.save(tables("euler", default=False), again)
    step_table.save(tables(), again)
    assert step_table.digest(again) == step_table.digest(folder)
    assert step_table.size_bytes(again) == step_table.size_bytes(folder) > 0


def test_the_default_scheduler_comes_first_and_needs_no_name(folder: Path) -> None:
    found = step_table.open_tables(folder)
    assert found.default == "pndm"
    assert found.schedulers == ("pndm", "euler")
    assert found.load(None, 2).scheduler == "pndm"


def test_another_count_is_refused_with_the_range_and_the_reason(folder: Path) -> None:
    found = step_table.open_tables(folder)
    with pytest.raises(UsageError, match=r"(?s)2 to 3, 5 steps.*why not"):
        found.load("pndm", 4)
    with pytest.raises(UsageError, match="2 to 3, 5 steps"):
        found.load("pndm", 51)


def test_an_unknown_scheduler_is_refused_with_the_list(folder: Path) -> None:
    with pytest.raises(UsageError, match="pndm, euler"):
        step_table.open_tables(folder).load("../../etc/passwd", 4)


def test_a_truncated_file_is_noticed(folder: Path) -> None:
    path = folder / "pndm.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="cut off"):
        step_table.validate(folder)


def test_a_file_of_something_else_is_noticed(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, "float32")}, folder / "ddim.safetensors")
    with pytest.raises(ArtifactError, match="description"):
        step_table.open_tables(folder)


def test_a_file_under_another_schedulers_name_is_noticed(folder: Path) -> None:
    (folder / "pndm.safetensors").rename(folder / "ddim.safetensors")
    with pytest.raises(ArtifactError, match=r"ddim\.safetensors"):
        step_table.open_tables(folder)


def test_a_newer_major_schema_is_refused(folder: Path) -> None:
    path = folder / "pndm.safetensors"
    path.write_bytes(path.read_bytes().replace(b"step_tables/1.0", b"step_tables/2.0"))
    with pytest.raises(ArtifactError, match="2\\.0"):
        step_table.open_tables(folder)


def test_two_default_schedulers_are_noticed(folder: Path) -> None:
    step_table.save(tables("ddim"), folder)
    with pytest.raises(ArtifactError, match="2 default schedulers"):
        step_table.open_tables(folder)


def test_an_empty_folder_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="0 default schedulers"):
        step_table.validate(tmp_path)


def test_numbers_that_are_not_finite_are_noticed(folder: Path) -> None:
    table = made_up(2)
    bad = replace(table, latent_coefficients=np.full_like(table.latent_coefficients, np.nan))
    step_table.save(replace(tables(), tables={2: bad}), folder)
    with pytest.raises(ArtifactError, match="not finite"):
        step_table.validate(folder)


def test_the_layout_is_the_documented_one(folder: Path) -> None:
    raw = (folder / "pndm.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    description = json.loads(header.pop("__metadata__")["step_tables"])
    assert description["init_noise_sigma"] == {"2": 3.0, "3": 4.5, "5": 7.5}
    entry = header["3.calls"]
    assert (entry["dtype"], entry["shape"]) == ("F32", [4, 3])
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    calls = np.frombuffer(raw[begin:end], "<f4").reshape(4, 3)
    table = made_up(3)
    columns = (table.timesteps, table.input_scales, table.noise_coefficients)
    assert np.array_equal(calls.T, columns)
