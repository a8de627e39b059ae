"""A plan in a TFLite file: every planned layer in INT8 and no other, and what it computes."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.errors import ArtifactError, StageError
from diffoundry.exporters import tflite_convert
from diffoundry.exporters.tflite_from_exported_program import TfliteFromExportedProgram
from diffoundry.exporters.tflite_integer import apply_plan, layers_to_fence
from diffoundry.formats import tflite
from diffoundry.formats.quant_plan import Grid, QuantPlan
from diffoundry.formats.tflite_editing import Model
from diffoundry.runtimes.tflite_interpreter import OpenedTflite, TfliteInterpreter
from diffoundry.types import Array, Artifact
from tests.exporters import tiny_int8, tiny_tflite as tiny

STAGE = TfliteFromExportedProgram(tiny.POLICY, "int8")
PLAN = tiny_int8.make_plan()
WEIGHTS = {name: value.numpy() for name, value in tiny.tiny_network().state_dict().items()}


def convert(plan: QuantPlan, folder: Path) -> Artifact:
    return tiny.make_tflite(folder, STAGE, plan=tiny_int8.saved(plan, folder))


@functools.cache
def shared() -> Artifact:
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return convert(PLAN, folder)


@functools.cache
def fenced() -> Path:
    """The network at its usual shape in fp32, its layers fenced in."""
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = trace(tiny.tiny_network(), tiny.CONTRACT, dynamic=False)
    file = folder / "model.tflite"
    tflite_convert.convert(program, tiny.CONTRACT, [tiny.USUAL], file, layers_to_fence(PLAN))
    return file


def applied(plan: QuantPlan, folder: Path) -> Artifact:
    """The plan in that file."""
    file = folder / tflite.MODEL_FILE
    apply_plan(fenced(), file, plan, WEIGHTS)
    tflite.write_facts(folder, tiny.CONTRACT, "int8")
    return dataclasses.replace(shared(), path=folder)


def opened(artifact: Artifact) -> OpenedTflite:
    return TfliteInterpreter().open(artifact, artifact.contract or tiny.CONTRACT, "cpu", 1)


def outputs(artifact: Artifact, shape: dict[str, int]) -> dict[str, Array]:
    return opened(artifact).infer(tiny.on_device(tiny.feeds_at(shape)))


def test_every_planned_layer_is_int8_in_the_file_and_no_other() -> None:
    assert tflite.integer_layers(shared().path) == dict(sorted(tiny_int8.SCHEMES.items()))
    assert tflite.integer_layers(tiny.shared_tflite().path) == {}
    assert shared().type.precision == "int8"
    tflite.validate(shared().path)


@pytest.mark.parametrize("shape", [tiny.USUAL, tiny.OTHER])
def test_both_signatures_compute_the_plan(shape: dict[str, int]) -> None:
    found = outputs(shared(), shape)
    wanted = tiny_int8.simulation(PLAN, tiny.feeds_at(shape))
    for name, value in wanted.items():
        assert found[name].dtype == np.float32
        assert tiny_int8.sqnr_db(value, found[name]) > 33, name


def test_weights_of_both_signatures_are_stored_once() -> None:
    size = tflite.model_file(shared().path).stat().st_size
    assert size < 0.4 * tflite.model_file(tiny.shared_tflite().path).stat().st_size
    values = tiny.tiny_network().state_dict().values()
    weights = sum(value.numel() for value in values if value.ndim > 1)
    assert tflite.weight_types(shared().path)["int8"] == weights


def test_the_runtime_says_which_layers_it_multiplies_in_integers() -> None:
    used = opened(shared()).precision_used()
    assert used["integer_layers"] == ["conv_in", "conv_out", "narrow", "wide"]
    assert used["integer_kernels"] == {"XNNPACK": 4}
    assert used["compute"] == ["float32", "int8"]
    assert "integer_layers" not in opened(tiny.shared_tflite()).precision_used()


def test_a_dynamic_layer_really_multiplies_integers(tmp_path: Path) -> None:
    plan = tiny_int8.make_plan({"wide": "dynamic"})
    weights = tiny_int8.make_plan({"wide": "weight_only"})
    feeds = tiny.feeds_at(tiny.USUAL)
    found = outputs(applied(plan, tmp_path), tiny.USUAL)["words"]
    assert tiny_int8.sqnr_db(tiny_int8.simulation(plan, feeds)["words"], found) > 60
    assert tiny_int8.sqnr_db(tiny_int8.simulation(weights, feeds)["words"], found) < 50


def test_weights_alone_are_the_plan_s_exactly(tmp_path: Path) -> None:
    plan = tiny_int8.make_plan(dict.fromkeys(tiny_int8.SCHEMES, "weight_only"))
    artifact = applied(plan, tmp_path)
    for name, value in tiny_int8.simulation(plan, tiny.feeds_at(tiny.USUAL)).items():
        assert tiny_int8.sqnr_db(value, outputs(artifact, tiny.USUAL)[name]) > 110
    assert set(tflite.integer_layers(artifact.path).values()) == {"weight_only"}
    assert opened(artifact).precision_used()["integer_layers"] == []


def test_corrected_biases_are_written_in_every_scheme(tmp_path: Path) -> None:
    moved = {
        f"{name}.bias": layer.bias.detach().numpy() + 0.5
        for name, layer in tiny.tiny_network().named_modules()
        if name in tiny_int8.SCHEMES and name != "words"
    }
    plan = dataclasses.replace(
        tiny_int8.make_plan({**tiny_int8.SCHEMES, "conv_in": "weight_only", "narrow": "dynamic"}),
        tensors={**PLAN.tensors, **moved},
    )
    found = outputs(applied(plan, tmp_path), tiny.USUAL)
    for name, value in tiny_int8.simulation(plan, tiny.feeds_at(tiny.USUAL)).items():
        assert tiny_int8.sqnr_db(value, found[name]) > 33, name


def test_a_layer_in_float_keeps_its_weight(tmp_path: Path) -> None:
    plan = tiny_int8.make_plan({"wide": "weight_only"})
    assert tflite.integer_layers(applied(plan, tmp_path).path) == {"wide": "weight_only"}


def test_a_plan_of_another_model_is_refused_with_all_its_layers(tmp_path: Path) -> None:
    names = {"wide": "elsewhere", "narrow": "nowhere"}
    layers = tuple(
        dataclasses.replace(one, module=names.get(one.module, one.module)) for one in PLAN.layers
    )
    with pytest.raises(ArtifactError, match="2 that are not: elsewhere, nowhere"):
        applied(dataclasses.replace(PLAN, layers=layers), tmp_path)


def test_layers_that_the_file_lost_are_refused_with_their_names(tmp_path: Path) -> None:
    """Converted without fences and with other weights: nothing is found there."""
    weights = {name: value + 1 for name, value in WEIGHTS.items()}
    with pytest.raises(ArtifactError, match="conv_in, conv_out") as caught:
        apply_plan(fenced(), tmp_path / "model.tflite", PLAN, weights)
    assert "words" in caught.value.found and "converted file" in caught.value.where


def test_static_layers_without_a_range_of_their_output_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="narrow, conv_in") as caught:
        applied(tiny_int8.make_plan(output=None), tmp_path)
    assert "quantize_outputs" in caught.value.remedy and "dynamic" in caught.value.remedy


def test_the_same_stage_gives_the_same_bytes(tmp_path: Path) -> None:
    assert tflite.digest(convert(PLAN, tmp_path).path) == tflite.digest(shared().path)


def test_integers_that_nobody_planned_are_reported(tmp_path: Path) -> None:
    model = Model.read(tflite.model_file(tiny.shared_tflite().path))
    graph = next(model.graphs())
    product = next(one for one in graph.operators() if graph.kind(one) == "MUL")
    graph.quantize_input(product, Grid(0.5, 3))
    model.write(tmp_path / "model.tflite")
    found = tflite.integer_layers(tmp_path / "model.tflite")
    assert list(found.values()) == ["unplanned"] and "int8" in next(iter(found))


@pytest.mark.parametrize(("precision", "names"), [("int8", {"program", "plan"}),
                                                  ("fp32", {"program"})])  # fmt: skip
def test_only_int8_needs_a_plan(precision: str, names: set[str]) -> None:
    stage = TfliteFromExportedProgram(precision=precision)  # type: ignore[arg-type]
    assert set(stage.inputs()) == names
