"""The stage: few values in each weight, a folder that loads again, and Core ML's tables of it."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compilers.palettize_weights import PalettizeWeights
from diffoundry.compression.layers import find_layers
from diffoundry.errors import StageError
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.formats import exported_program, mlpackage, torch_module
from diffoundry.models.components import load_component
from diffoundry.runtimes.mil_reference import MilReference
from diffoundry.types import Artifact, ArtifactType
from tests.compilers.mini_component import MiniComponent
from tests.mini_pipelines import make_named

SMALL = 256


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    pipeline = make_named(tmp_path_factory.mktemp("mini"), "lcm")
    return MiniComponent(pipeline, tmp_path_factory.mktemp("vae"), "vae_decoder")


@pytest.fixture(scope="module")
def palettized(mini):
    return mini.run(PalettizeWeights(bits=4, keep=("*conv_out",), min_elements=SMALL))["module"]


def weights_of(module):
    layers = dict(module.named_modules())
    return {name: layers[name].weight.detach().numpy() for name in find_layers(module)}


def test_every_large_weight_has_few_values_and_the_rest_stays(mini, palettized):
    torch_module.validate(palettized)
    before, after = weights_of(mini.module), weights_of(load_component(palettized, "vae_decoder"))
    assert before.keys() == after.keys()
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    large = [n for n, w in before.items() if w.size >= SMALL and not n.endswith("conv_out")]
    assert changed == large and len(large) > 5 and "decoder.conv_out" in before
    assert all(len(np.unique(after[name])) <= 16 for name in large)
    # The best 16 values for normal ones leave 9.8 % (Lloyd 1982, Max 1960).
    assert max((after[n] - before[n]).std() / before[n].std() for n in large) < 0.11


def test_groups_of_channels_have_tables_of_their_own(mini):
    folder = mini.run(PalettizeWeights(bits=2, group=3, min_elements=SMALL), "grouped")["module"]
    after = weights_of(load_component(folder, "vae_decoder"))
    weight = next(w for w in after.values() if w.size >= SMALL and len(w) >= 7)
    assert len(np.unique(weight)) > 4
    for start in range(0, len(weight), 3):  # the last group may be smaller
        assert len(np.unique(weight[start : start + 3])) <= 4


def test_the_same_run_writes_the_same_bytes(mini, palettized):
    stage = PalettizeWeights(bits=4, keep=("*conv_out",), min_elements=SMALL)
    assert torch_module.digest(mini.run(stage, "again")["module"]) == torch_module.digest(
        palettized
    )


def test_what_has_few_values_already_is_not_touched(mini, palettized):
    again = MiniComponent.__new__(MiniComponent)
    again.__dict__ = {**mini.__dict__, "inputs": {**mini.inputs}}
    again.inputs["module"] = mini.artifact("torch_module", palettized)
    stage = PalettizeWeights(bits=6, keep=("*conv_out",), min_elements=SMALL)
    folder = again.run(stage, "twice")["module"]
    first, second = (weights_of(load_component(f, "vae_decoder")) for f in (palettized, folder))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [({"bits": 5}, "bits among"), ({"group": -1}, "group"), ({"keep": ("*",)}, "not kept")],
)
def test_wrong_options_are_refused(mini, wrong, hint):
    name = next(iter(wrong))
    with pytest.raises(StageError, match=hint):
        mini.run(PalettizeWeights(**wrong), f"wrong-{name}")


@pytest.fixture(scope="module")
def program(mini, palettized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    module = load_component(palettized, "vae_decoder")
    exported_program.save(trace(module, mini.contract, dynamic=False), folder)
    return folder


def package(mini, program, name, **options):
    stage = CoremlFromExportedProgram(precision="fp16", **options)
    given = {"program": mini.artifact("exported_program", program)}
    made = stage.run(given, mini.context(name))["model"]
    mlpackage.validate(made.path)
    kind = ArtifactType("mlpackage", "fp16")
    return Artifact(kind, made.path, "", "vae_decoder", contract=made.contract)


def test_core_ml_stores_tables_and_rounds_nothing(mini, program):
    tables = package(mini, program, "tables", palette_bits=4)
    plain = package(mini, program, "plain")
    operations = [
        one.type
        for function in mlpackage.read_spec(tables.path).mlProgram.functions.values()
        for one in function.block_specializations[function.opset].operations
    ]
    assert "constexpr_lut_to_dense" in operations
    files = [
        mlpackage.package(one.path) / "Data" / mlpackage.WEIGHT_FILE for one in (tables, plain)
    ]
    assert files[0].stat().st_size < 0.6 * files[1].stat().st_size
    (call, *_) = mini.calls(1, 7)
    found = [
        MilReference().open(one, one.contract, "cpu").infer(call.feeds) for one in (tables, plain)
    ]
    for name, value in found[0].items():
        assert np.array_equal(value, found[1][name])


def test_core_ml_refuses_tables_of_weights_that_have_too_many_values(mini, program, tmp_path):
    whole = tmp_path / "program"
    whole.mkdir()
    exported_program.save(trace(mini.module, mini.contract, dynamic=False), whole)
    with pytest.raises(StageError, match="none") as caught:
        package(mini, whole, "refused", palette_bits=4)
    assert "palettize_weights" in caught.value.remedy
