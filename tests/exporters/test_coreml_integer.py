"""A plan in a Core ML package: every planned layer in INT8 and no other, and what it computes."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from diffoundry.errors import ArtifactError, ProfileError, StageError
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.exporters.coreml_integer import with_plan
from diffoundry.formats import exported_program, mil_int8, mlpackage
from diffoundry.formats.quant_plan import QuantPlan, Scheme
from diffoundry.types import Artifact
from tests.exporters import tiny_coreml as tiny, tiny_int8
from tests.exporters.tiny_tflite import USUAL, feeds_at

INT8 = CoremlFromExportedProgram(precision="int8")
SCHEMES: dict[str, Scheme] = {
    "words": "weight_only",
    "wide": "static",
    "narrow": "weight_only",
    "conv_in": "static",
    "conv_out": "static",
}
PLAN = tiny_int8.make_plan(SCHEMES, output=None)


def convert(plan: QuantPlan, stage: CoremlFromExportedProgram = INT8) -> Artifact:
    saved = tiny_int8.saved(plan, tiny.work())
    return tiny.convert(stage, tiny.work(), tiny.program(4), plan=saved)


@functools.cache
def shared() -> Artifact:
    return convert(PLAN)


def test_every_planned_layer_is_int8_in_the_package_and_no_other() -> None:
    assert mlpackage.integer_layers(shared().path) == dict(sorted(SCHEMES.items()))
    assert mlpackage.integer_layers(tiny.package(CoremlFromExportedProgram()).path) == {}
    assert shared().type.precision == "int8"


def test_it_computes_the_plan() -> None:
    found = tiny.opened(shared()).infer(tiny.feeds_at(USUAL))
    for name, wanted in tiny_int8.simulation(PLAN, feeds_at(USUAL)).items():
        assert tiny_int8.sqnr_db(wanted, found[name]) > 33, name


def test_weights_alone_in_float32_s_range_are_the_plan_s() -> None:
    """In a package of sizes that change, with corrected biases, and a layer that stays float."""
    names = ("wide", "narrow", "conv_in")
    modules = dict(tiny.tiny_network().named_modules())
    moved = {f"{name}.bias": modules[name].bias.detach().numpy() + 0.5 for name in names}  # type: ignore[union-attr,operator]
    schemes: dict[str, Scheme] = dict.fromkeys(("words", *names), "weight_only")
    plan = tiny_int8.make_plan(schemes)
    plan = dataclasses.replace(plan, tensors={**plan.tensors, **moved})
    artifact = convert(plan, dataclasses.replace(INT8, shape_policy=tiny.ENUMERATED))
    assert mlpackage.integer_layers(artifact.path) == dict(sorted(schemes.items()))
    for height, width in tiny.SIZES[:2]:
        shape = {"batch": 1, "height": height, "width": width}
        found = tiny.opened(artifact).infer(tiny.feeds_at(shape))
        for name, wanted in tiny_int8.simulation(plan, feeds_at(shape)).items():
            assert tiny_int8.sqnr_db(wanted, found[name]) > 50, name


def test_weights_take_a_quarter_of_the_space() -> None:
    plain = tiny.package(CoremlFromExportedProgram())
    assert mlpackage.size_bytes(shared().path) < 0.33 * mlpackage.size_bytes(plain.path)


def test_the_same_stage_gives_the_same_bytes() -> None:
    assert convert(PLAN).digest == shared().digest


def test_the_program_stays_as_it_was() -> None:
    program = exported_program.load(tiny.program(4).path)
    before = exported_program.describe(program)
    with_plan(program, PLAN)
    assert exported_program.describe(program) == before


def test_a_plan_of_another_model_is_refused_with_all_its_layers() -> None:
    names = {"wide": "elsewhere", "narrow": "nowhere"}
    layers = tuple(
        dataclasses.replace(one, module=names.get(one.module, one.module)) for one in PLAN.layers
    )
    plan = dataclasses.replace(PLAN, layers=layers)
    with pytest.raises(ArtifactError, match="2 that are not: elsewhere, nowhere"):
        with_plan(exported_program.load(tiny.program(4).path), plan)


def test_dynamic_activations_are_refused_by_name() -> None:
    plan = tiny_int8.make_plan({"wide": "dynamic", "narrow": "dynamic"})
    with pytest.raises(StageError, match="dynamic: wide, narrow") as caught:
        with_plan(exported_program.load(tiny.program(4).path), plan)
    assert "static" in caught.value.remedy


def test_integers_that_nobody_planned_are_reported() -> None:
    stage = CoremlFromExportedProgram(precision="fp16", weights="int8")
    found = mlpackage.integer_layers(tiny.package(stage).path)
    assert found and set(found.values()) == {"unplanned"}


@pytest.mark.parametrize("name", ["network.conv_in", "a_b.c__d.e_", "_d", "up.0.x_d_.1"])
def test_a_layer_s_name_survives_as_a_name_without_dots(name: str) -> None:
    written = mil_int8.weight_name(name)
    assert written.isidentifier()
    assert mil_int8.module_of(f"{written}_cast_fp16") == name


def test_other_names_are_nobody_s() -> None:
    assert mil_int8.module_of("conv_in_weight_to_fp16_quantized") is None


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"precision": "int8", "deployment_target": "iOS16"}, "iOS17"),
        ({"precision": "int8", "weights": "palette6"}, "float"),
        ({"palette_bits": 5}, "1, 2, 4, 6 or 8"),
        ({"palette_bits": 6, "weights": "int8"}, "float"),
        ({"palette_bits": 6, "palette_group": 8}, "iOS18"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, object], hint: str) -> None:
    with pytest.raises(ProfileError, match=hint):
        CoremlFromExportedProgram(**options)  # type: ignore[arg-type]


def test_only_int8_needs_a_plan() -> None:
    assert set(INT8.inputs()) == {"program", "plan"}
    assert set(CoremlFromExportedProgram().inputs()) == {"program"}


def test_ios18_has_other_operations_and_a_function_for_each_shape() -> None:
    several = tiny.policy((1, 16, 16), (2, 16, 16))
    stage = dataclasses.replace(INT8, shape_policy=several, deployment_target="iOS18")
    artifact = convert(PLAN, stage)
    assert mlpackage.integer_layers(artifact.path) == dict(sorted(SCHEMES.items()))
    for batch in (1, 2):
        shape = {**USUAL, "batch": batch}
        found = tiny.opened(artifact).infer(tiny.feeds_at(shape))
        for name, wanted in tiny_int8.simulation(PLAN, feeds_at(shape)).items():
            assert tiny_int8.sqnr_db(wanted, found[name]) > 33, name
    assert mlpackage.size_bytes(artifact.path) < 1.3 * mlpackage.size_bytes(shared().path)
