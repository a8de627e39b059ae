"""The recording format: round trip, canonical bytes, and every kind of damage noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import recording as rec
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

CONTRACT = Contract(
    "vae_decoder",
    inputs=(TensorSpec("latent", "float32", (AxisRef("batch"), 3, AxisRef("height", 4))),),
    outputs=(TensorSpec("image", "float32", (AxisRef("batch"), AxisRef("height"))),),
    axes=(Axis("batch", 1, 1, 4), Axis("height", 8, 8, 16, 4)),
)
FLOOR = rec.Floor(max_abs=1e-6, mean_abs=1e-7, rms=2e-7, sqnr_db=120.0)


def make_call(seed: int) -> rec.Call:
    draw = np.random.default_rng(seed)
    feeds = {"latent": draw.standard_normal((1, 3, 2)).astype(np.float32)}
    outputs = {"image": draw.standard_normal((1, 8)).astype(np.float32)}
    return rec.Call(feeds, outputs, {"batch": 1, "height": 8}, "a circle")


def make_component() -> rec.ComponentRecording:
    calls = (make_call(0), make_call(1))
    swap = rec.Swap(
        input="latent",
        base=0,
        feeds=calls[1].feeds,
        outputs=calls[1].outputs,
        status="real",
        effect=1.0,
        effects={"image": rec.Effect(1.0, 0.5)},
        value="call 1",
    )
    shaped = rec.ShapeCall(**vars(make_call(2)), traced=False)
    return rec.ComponentRecording(CONTRACT, calls, (swap,), (shaped,), {"fp32": {"image": FLOOR}})


def make_pipeline(noise: bool = True) -> rec.PipelineRecording:
    latents = np.ones((1, 3, 2, 2), np.float32)
    trajectory = rec.Trajectory(
        prompt="a circle",
        negative="",
        seed=7,
        scheduler="LCMScheduler",
        steps=2,
        guidance=3.0,
        shape={"batch": 1, "height": 8, "width": 8},
        initial_latents=latents,
        noise=np.zeros((2, 1, 3, 2, 2), np.float32) if noise else None,
        final_latents=latents * 2,
        image=np.zeros((1, 8, 8, 3), np.float32),
    )
    return rec.PipelineRecording((trajectory,), "evaluation", ("a note",))


def test_a_component_recording_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    original = make_component()
    rec.save(original, tmp_path / "r")
    rec.validate(tmp_path / "r")
    loaded = rec.load_component(tmp_path / "r")
    assert loaded.contract == CONTRACT
    assert loaded.floors == original.floors
    assert loaded.swaps_of("latent")[0].effects == original.swaps[0].effects
    assert loaded.shape_calls[0].traced is False
    for before, after in zip(original.calls, loaded.calls, strict=True):
        np.testing.assert_array_equal(before.feeds["latent"], after.feeds["latent"])
        assert after.outputs["image"].dtype == np.float32
        assert (before.shape, before.prompt) == (after.shape, after.prompt)


@pytest.mark.parametrize("noise", [True, False])
def test_a_pipeline_recording_comes_back_as_it_was_saved(tmp_path: Path, noise: bool) -> None:
    original = make_pipeline(noise)
    rec.save(original, tmp_path)
    rec.validate(tmp_path)
    loaded = rec.load_pipeline(tmp_path)
    (before,), (after,) = original.trajectories, loaded.trajectories
    assert (loaded.split, loaded.notes) == ("evaluation", ("a note",))
    assert (after.noise is None) == (not noise)
    np.testing.assert_array_equal(before.final_latents, after.final_latents)


def test_the_same_recording_has_the_same_bytes(tmp_path: Path) -> None:
    rec.save(make_component(), tmp_path / "a")
    rec.save(rec.load_component(tmp_path / "a"), tmp_path / "b")
    assert rec.digest(tmp_path / "a") == rec.digest(tmp_path / "b")


def test_equal_arrays_are_stored_once(tmp_path: Path) -> None:
    single = make_component()
    rec.save(single, tmp_path / "a")
    rec.save(dataclasses.replace(single, swaps=single.swaps * 9), tmp_path / "b")
    sizes = [(tmp_path / name / rec.TENSORS_FILE).stat().st_size for name in "ab"]
    assert sizes[0] == sizes[1]


def test_writing_to_a_loaded_array_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    rec.save(make_component(), tmp_path)
    rec.load_component(tmp_path).calls[0].feeds["latent"][:] = 9
    rec.validate(tmp_path)


def test_a_swap_decides_only_where_it_is_twenty_times_the_floor() -> None:
    swap = make_component().swaps[0]
    assert swap.decides({"image": FLOOR}) == ("image",)
    assert swap.decides({"image": dataclasses.replace(FLOOR, rms=0.026)}) == ()


def flip_a_byte(folder: Path) -> None:
    path = folder / rec.TENSORS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def truncate(folder: Path) -> None:
    path = folder / rec.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-4])


def remove_tensors(folder: Path) -> None:
    (folder / rec.TENSORS_FILE).unlink()


def break_json(folder: Path) -> None:
    (folder / rec.STRUCTURE_FILE).write_text("{")


def edit(folder: Path, change: str) -> None:
    path = folder / rec.STRUCTURE_FILE
    document = json.loads(path.read_text())
    if change == "schema":
        document["schema"] = "diffoundry.recording/2.0"
    elif change == "tensor":
        document["recording"]["calls"][0]["feeds"]["latent"] = {"tensor": "99999"}
    elif change == "field":
        del document["recording"]["floors"]
    elif change == "feeds":
        del document["recording"]["calls"][0]["feeds"]["latent"]
    elif change == "base":
        document["recording"]["swaps"][0]["base"] = 5
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, remove_tensors, break_json])
def test_damaged_files_are_noticed(tmp_path: Path, damage) -> None:
    rec.save(make_component(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError):
        rec.validate(tmp_path)


@pytest.mark.parametrize("change", ["schema", "tensor", "field", "feeds", "base"])
def test_a_structure_that_does_not_fit_is_noticed(tmp_path: Path, change: str) -> None:
    rec.save(make_component(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ArtifactError):
        rec.validate(tmp_path)


def test_the_wrong_kind_of_recording_is_refused(tmp_path: Path) -> None:
    rec.save(make_pipeline(), tmp_path)
    with pytest.raises(ArtifactError, match="ComponentRecording"):
        rec.load_component(tmp_path)
