"""Core ML packages: what they compute (by the reference interpreter), say, and refuse."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compression import palettes
from diffoundry.errors import ArtifactError, ContractError, ProfileError, StageError
from diffoundry.exporters import coreml_convert
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.formats import exported_program, mlpackage
from diffoundry.formats.edges import own_shapes
from diffoundry.types import Artifact, ArtifactType, Axis, Contract, ShapePolicy, TensorSpec
from tests.compilers.small_network import CONTRACT as SMALL, make_program
from tests.exporters import tiny_coreml as tiny
from tests.exporters.tiny_tflite import CONTRACT, USUAL

HALF = CoremlFromExportedProgram(precision="fp16")
SINGLE = CoremlFromExportedProgram()
MOVING = CoremlFromExportedProgram(precision="fp16", shape_policy=tiny.ENUMERATED)


def operations(artifact: Artifact) -> list[Any]:
    function = mlpackage.read_spec(artifact.path).mlProgram.functions["main"]
    return list(function.block_specializations[function.opset].operations)


def agrees(artifact: Artifact, shape: dict[str, int], least_db: float) -> None:
    feeds = tiny.feeds_at(shape)
    found, wanted = tiny.opened(artifact).infer(feeds), tiny.reference(feeds)
    for name, value in wanted.items():
        assert tiny.psnr_db(value, found[name]) >= least_db, name


@pytest.mark.parametrize(("stage", "least_db"), [(SINGLE, 110), (HALF, 55)])
def test_a_fixed_package_computes_the_original(
    stage: CoremlFromExportedProgram, least_db: float
) -> None:
    agrees(tiny.package(stage), USUAL, least_db)


def test_a_fixed_package_refuses_another_shape() -> None:
    fixed = dataclasses.replace(
        tiny.package(HALF),
        type=ArtifactType("mlpackage", "fp16", ShapePolicy("fixed", (tuple(USUAL.items()),))),
    )
    with pytest.raises(ContractError, match="fixed shapes"):
        tiny.opened(fixed).infer(tiny.feeds_at({**USUAL, "height": 24}))


def test_int64_becomes_int32_in_the_contract_and_in_the_file() -> None:
    artifact = tiny.package(HALF)
    assert artifact.contract is not None
    assert [spec.dtype for spec in artifact.contract.inputs] == ["float32", "int32"]
    described = {f.name: f for f in mlpackage.read_spec(artifact.path).description.input}
    kinds = described["input_ids"].type.multiArrayType
    assert kinds.dataType == type(kinds).INT32
    with pytest.raises(ContractError, match="int64"):
        tiny.opened(artifact).infer(
            {**tiny.feeds_at(USUAL), "input_ids": np.zeros((1, 5), np.int64)}
        )


def test_one_package_runs_at_every_enumerated_shape_and_no_other() -> None:
    artifact = tiny.package(MOVING)
    for height, width in tiny.SIZES:
        agrees(artifact, {"batch": 1, "height": height, "width": width}, 55)
    with pytest.raises(ContractError, match="enumerated"):
        tiny.opened(artifact).infer(tiny.feeds_at({"batch": 1, "height": 32, "width": 32}))


def test_a_dynamic_package_runs_at_a_shape_that_was_never_traced() -> None:
    stage = CoremlFromExportedProgram(precision="fp16", shape_policy=ShapePolicy())
    agrees(tiny.package(stage, batches=1), {"batch": 1, "height": 40, "width": 24}, 55)


def test_a_batch_that_moves_is_refused_with_the_converters_words() -> None:
    with pytest.raises(StageError, match="unet") as caught:
        tiny.package(CoremlFromExportedProgram(shape_policy=ShapePolicy()))
    assert "symbolic" in caught.value.found and "fix the axis" in caught.value.remedy


def test_shapes_of_several_inputs_become_functions_that_share_their_weights() -> None:
    several = tiny.policy((1, 16, 16), (2, 16, 16))
    stage = CoremlFromExportedProgram(
        precision="fp16", shape_policy=several, deployment_target="iOS18"
    )
    artifact = tiny.package(stage)
    for batch in (1, 2):
        agrees(artifact, {**USUAL, "batch": batch}, 55)
    assert mlpackage.size_bytes(artifact.path) < 1.2 * mlpackage.size_bytes(tiny.package(HALF).path)
    names = [edges.function for edges in mlpackage.read_edges(artifact.path)]
    assert names == ["batch_1_height_16_width_16", "batch_2_height_16_width_16"]


def test_older_systems_have_no_functions_and_the_list_is_refused() -> None:
    several = tiny.policy((1, 16, 16), (2, 16, 16))
    with pytest.raises(StageError, match="enumerated shapes") as caught:
        tiny.package(dataclasses.replace(HALF, shape_policy=several))
    assert "iOS18" in caught.value.expected and "sample" in caught.value.found


def test_what_xcode_shows() -> None:
    stage = dataclasses.replace(HALF, author="Ann", license="Apache-2.0", version="1.2")
    description = mlpackage.read_spec(tiny.package(stage).path).description
    shown = description.metadata
    assert (shown.author, shown.license, shown.versionString) == ("Ann", "Apache-2.0", "1.2")
    assert "unet" in shown.shortDescription and "fp16" in shown.shortDescription
    texts = [f.shortDescription for f in (*description.input, *description.output)]
    assert texts[0].endswith("float32 [batch, 4, height/4, width/4]: 1 × 4 × 4 × 4")
    assert len(texts) == 4 and all(texts)


@pytest.mark.parametrize(
    ("form", "share", "kind"),
    [
        ("int8", 0.6, "constexpr_affine_dequantize"),
        ("palette6", 0.5, "constexpr_lut_to_dense"),
        pytest.param("palette8", 0.6, "constexpr_lut_to_dense", marks=pytest.mark.slow),
        pytest.param("palette4", 0.4, "constexpr_lut_to_dense", marks=pytest.mark.slow),
    ],
)
def test_compressed_weights_are_small_and_close(form: Any, share: float, kind: str) -> None:
    artifact = tiny.package(dataclasses.replace(HALF, weights=form))
    plain = tiny.package(HALF)
    assert mlpackage.size_bytes(artifact.path) < share * mlpackage.size_bytes(plain.path)
    assert kind in {operation.type for operation in operations(artifact)}
    agrees(artifact, USUAL, {"int8": 35, "palette8": 35, "palette6": 25, "palette4": 15}[form])


def test_a_palette_is_always_the_same_and_better_than_equal_steps() -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float16)
    table, indices = palettes.palette(values.reshape(50, 100), 4)
    again, _ = palettes.palette(values.reshape(50, 100), 4)
    assert table.shape == (16,) and np.array_equal(table, again)
    assert indices.shape == (5000,) and indices.dtype == np.uint8
    error = np.square(table[indices].astype(np.float32) - values).mean()
    steps = np.linspace(values.min(), values.max(), 16, dtype=np.float32)
    equal = np.square(np.abs(values[:, None] - steps).min(axis=1)).mean()
    assert error < 0.6 * equal
    nearest = np.abs(values[:, None].astype(np.float32) - table.astype(np.float32)).argmin(axis=1)
    assert (nearest != indices).mean() < 0.01


def test_a_palette_larger_than_the_values_keeps_them_exactly() -> None:
    values = np.array([1.0, 2.0, 2.0, 5.0], np.float32)
    table, indices = palettes.palette(values, 4)
    assert np.array_equal(table[indices], values)


def test_the_sinusoids_of_the_timestep_stay_in_fp32(tmp_path: Path) -> None:
    source = dataclasses.replace(make_program(tmp_path), contract=SMALL)
    for keep, expected in ((("sin", "cos"), "FLOAT32"), ((), "FLOAT16")):
        work = tmp_path / expected
        work.mkdir()
        made = tiny.convert(dataclasses.replace(HALF, keep_fp32=keep), work, source)
        types = {
            op.type: op.outputs[0].type.tensorType
            for op in operations(made)
            if op.type in ("sin", "cos", "conv")
        }
        kinds = {name: kind.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[
            kind.dataType].name for name, kind in types.items()}  # fmt: skip
        assert kinds == {"sin": expected, "cos": expected, "conv": "FLOAT16"}


PICTURE = Contract(
    "vae_decoder",
    (TensorSpec("latent", "float32", (1, 4, 8, 8)),),
    (TensorSpec("image", "float32", (1, 3, 8, 8)),),
    (Axis("batch", 1, 1, 1),),
)


def test_a_decoder_may_hand_over_an_image(tmp_path: Path) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(4, 3, 3, padding=1).eval().requires_grad_(False)
    exported_program.save(trace(network, PICTURE), tmp_path)
    source = Artifact(ArtifactType("exported_program"), tmp_path, "", contract=PICTURE)
    work = tmp_path / "work"
    work.mkdir()
    made = tiny.convert(dataclasses.replace(HALF, image_output=True), work, source)
    (edges,) = mlpackage.read_edges(made.path)
    assert edges.images == ("image",)
    latent = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    found = tiny.opened(made).infer({"latent": latent})["image"]
    wanted = network(torch.from_numpy(latent)).clamp(-1, 1).numpy()
    assert found.shape == (1, 3, 8, 8) and np.abs(found - wanted).max() < 0.6 / 127.5 + 2e-3


def test_an_image_has_one_size() -> None:
    with pytest.raises(ProfileError, match="image_output"):
        CoremlFromExportedProgram(image_output=True, shape_policy=tiny.ENUMERATED)


def test_only_a_picture_can_be_an_image() -> None:
    with pytest.raises(StageError, match="image_output"):
        tiny.package(dataclasses.replace(HALF, image_output=True))


@pytest.mark.parametrize(
    "options", [{"deployment_target": "iOS15"}, {"precision": "int4"}, {"weights": "int2"}]
)
def test_wrong_options_are_profile_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match=next(iter(options))):
        CoremlFromExportedProgram(**options)


def test_options_come_back_from_plain_data() -> None:
    assert CoremlFromExportedProgram(**dataclasses.asdict(MOVING)) == MOVING


def test_a_component_without_the_axis_has_one_shape() -> None:
    words = dataclasses.replace(CONTRACT, axes=CONTRACT.axes[:1])
    assert own_shapes(words, tiny.ENUMERATED) == ({"batch": 1},)


def test_the_usual_shape_comes_first_and_is_the_default() -> None:
    policy = tiny.policy((1, 32, 16), (1, 16, 16))
    assert own_shapes(CONTRACT, policy)[0] == USUAL


def test_a_converter_that_raises_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import coremltools

    def broken(*args: object, **options: object) -> None:
        raise KeyError("no such thing as a frobnicate")

    monkeypatch.setattr(coremltools, "convert", broken)
    with pytest.raises(StageError, match="frobnicate") as caught:
        tiny.package(dataclasses.replace(HALF, author="nobody"))
    assert "coreml_from_exported_program: unet" in caught.value.where


def test_an_operation_that_the_converter_cannot_take_is_named(tmp_path: Path) -> None:
    import torch

    class Odd(torch.nn.Module):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(latent)[:, :3]

    exported_program.save(trace(Odd(), PICTURE), tmp_path)
    source = Artifact(ArtifactType("exported_program"), tmp_path, "", contract=PICTURE)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(StageError, match="i0"):
        tiny.convert(HALF, work, source)


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.exporters import tiny_coreml as tiny; "
        "from tests.exporters.test_coreml_from_exported_program import SAME; "
        "print(tiny.convert(SAME, Path(sys.argv[1]), tiny.program()).digest)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=False, env={**_environment(), "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split()[-1] == tiny.package(SAME).digest


SAME = dataclasses.replace(HALF, weights="palette6")


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_a_package_without_an_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = coreml_convert.convert

    def loses_an_output(program: Any, contract: Contract, *rest: Any) -> None:
        first = dataclasses.replace(contract.outputs[0], name="lost")
        merged(
            program,
            dataclasses.replace(contract, outputs=(first, *contract.outputs[1:])),
            *rest,
        )

    monkeypatch.setattr(coreml_convert, "convert", loses_an_output)
    with pytest.raises(StageError, match="edges"):
        tiny.package(dataclasses.replace(HALF, author="somebody"))


def test_the_wrong_runtime_is_refused() -> None:
    from diffoundry.runtimes.onnx_session import OnnxSession
    from diffoundry.sessions import open_session

    with pytest.raises(ArtifactError, match="cannot open"):
        open_session(OnnxSession(), tiny.package(HALF), CONTRACT)
