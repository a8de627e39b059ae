"""The TFLite stage: signatures, edges, shared weights, fp16 weights, equal bytes, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters import tflite_convert, tflite_from_exported_program
from diffoundry.exporters.tflite_from_exported_program import TfliteFromExportedProgram
from diffoundry.formats import exported_program, tflite
from diffoundry.formats.edges import own_shapes
from diffoundry.memory import MappedFile
from diffoundry.planning.planner import make_plan
from diffoundry.runtimes.tflite_interpreter import TfliteInterpreter
from diffoundry.types import Artifact, Contract, ShapePolicy, StageContext
from tests.exporters import tiny_tflite as tiny
from tests.mini_pipelines import make_named

FP32_BYTES = 4 * sum(p.numel() for p in tiny.tiny_network().parameters())


def outputs(artifact: Artifact, shape: dict[str, int]) -> tuple[dict, dict]:
    feeds = tiny.feeds_at(shape)
    session = TfliteInterpreter().open(artifact, tiny.CONTRACT, "cpu", 1)
    return session.infer(tiny.on_device(feeds)), tiny.reference(feeds)


def test_each_shape_is_a_signature_with_the_contracts_names() -> None:
    artifact = tiny.shared_tflite()
    found = {one.name: one for one in tflite.read_signatures(artifact.path)}
    assert list(found) == ["b1_h16_w16", "b2_h32_w16"]
    other = found["b2_h32_w16"]
    assert {name: one.shape for name, one in other.inputs.items()} == {
        "sample": (2, 4, 8, 4), "input_ids": (2, 5),
    }  # fmt: skip
    assert set(other.outputs) == {"model_output", "words"}


def test_int32_stands_where_int64_stood_and_the_engines_contract_says_so() -> None:
    artifact = tiny.shared_tflite()
    assert artifact.contract is not None
    assert [spec.dtype for spec in artifact.contract.inputs] == ["float32", "int32"]
    (usual, _) = tflite.read_signatures(artifact.path)
    assert usual.inputs["input_ids"].dtype == "int32"
    assert tflite.read_facts(artifact.path)["signatures"]["b1_h16_w16"]["inputs"]["input_ids"] == {
        "dtype": "int32", "shape": [1, 5],
    }  # fmt: skip


@pytest.mark.parametrize("shape", [tiny.USUAL, tiny.OTHER])
def test_every_signature_computes_what_pytorch_computes(shape: dict[str, int]) -> None:
    found, expected = outputs(tiny.shared_tflite(), shape)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_signatures_share_their_weights() -> None:
    artifact = tiny.shared_tflite()
    stored = tflite.weight_types(artifact.path)
    assert stored["float32"] <= 1.01 * FP32_BYTES
    # Both graphs together; the weights are what is large.
    assert tflite.model_file(artifact.path).stat().st_size <= 1.05 * FP32_BYTES


def test_weights_in_fp16_are_half_the_size_and_computed_with_in_fp32() -> None:
    artifact = tiny.shared_tflite("fp16")
    assert tflite.model_file(artifact.path).stat().st_size <= 0.56 * FP32_BYTES
    stored = tflite.weight_types(artifact.path)
    assert stored["float16"] > 0.45 * FP32_BYTES
    for shape in (tiny.USUAL, tiny.OTHER):
        found, expected = outputs(artifact, shape)
        for name, value in expected.items():
            assert found[name].dtype == np.float32
            noise = np.mean((found[name] - value) ** 2)
            assert 10 * np.log10(np.mean(value**2) / noise) > 60, name
    assert tflite.read_facts(artifact.path)["weights"] == "fp16"


def test_a_second_conversion_in_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from tests.exporters import tiny_tflite as tiny\n"
        "stage = tiny.TfliteFromExportedProgram(tiny.POLICY)\n"
        "print(tiny.make_tflite(pathlib.Path(sys.argv[1]), stage).path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(tmp_path / "work" / "model")], "noise on the terminal"
    again = tmp_path / "work" / "model"
    assert tflite.digest(again) == tflite.digest(tiny.shared_tflite().path)
    assert str(tmp_path).encode() not in tflite.model_file(again).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["program", "work"], "files left behind"
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["model"]


def test_operations_carry_the_names_of_the_layers_they_came_from() -> None:
    names = [name for _, name in tflite.operations(tiny.shared_tflite().path, 0)]
    assert any(name.startswith("conv_in;") for name in names)
    assert not any("tests." in name or "/" in name for name in names), names


def test_the_program_stays_as_it_was_for_the_next_target(tmp_path: Path) -> None:
    """A worker keeps it in memory: what stands in it would change another target's bytes."""
    program = exported_program.load(tiny.make_program(tmp_path).path)

    def stacks() -> list[str]:
        return [str(node.meta.get("nn_module_stack")) for node in program.graph.nodes]

    before = stacks(), exported_program.describe(program)
    tflite_convert.convert(program, tiny.CONTRACT, [tiny.USUAL], tmp_path / "model.tflite")
    assert (stacks(), exported_program.describe(program)) == before
    assert "conv_in" in " ".join(before[0])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_mapped_weights_are_let_go_and_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []

    class Counted(MappedFile):
        def give_back(self, address: int, size: int) -> int:
            given_back.append(super().give_back(address, size))
            return given_back[-1]

    monkeypatch.setattr(tflite_convert, "MappedFile", Counted)
    program = tiny.make_program(tmp_path)
    exported_program.forget()  # or the weights would be those of this process, not the file's
    made = tiny.make_tflite(tmp_path, TfliteFromExportedProgram(tiny.POLICY), program)
    assert sum(given_back) >= 4 * 512 * 512 - 2 * os.sysconf("SC_PAGESIZE")
    assert tflite.digest(made.path) == tflite.digest(tiny.shared_tflite().path)


def test_a_component_without_sides_has_one_signature_of_its_batch() -> None:
    text_encoder = Contract("text_encoder", (), (), tiny.CONTRACT.axes[:1])
    policy = ShapePolicy(
        "enumerated",
        (
            (("batch", 1), ("height", 16), ("width", 16)),
            (("batch", 1), ("height", 32), ("width", 16)),
        ),
    )
    assert own_shapes(text_encoder, policy) == ({"batch": 1},)
    assert tflite.signature_name(text_encoder, {"batch": 1}) == "b1"
    assert own_shapes(tiny.CONTRACT, ShapePolicy("fixed")) == (tiny.USUAL,)


def test_dynamic_shapes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no shapes that change between calls"):
        TfliteFromExportedProgram(ShapePolicy("dynamic"))
    model = make_named(tmp_path / "lcm", "lcm")
    (tmp_path / "mine.toml").write_text(
        'schema = "diffoundry.profile/1.0"\nname = "mine"\n[[variants]]\nname = "one"\n'
        'runtime = "tflite_interpreter"\nshapes = "dynamic"\n'
        'route = [{ stage = "exported_program_from_torch" },\n'
        '         { stage = "tflite_from_exported_program" }]\n'
    )
    with pytest.raises(ProfileError, match="list the shapes"):
        make_plan(model, str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"precision": "fp8"}, "fp32 or fp16"), ({"minimum_runtime": "newest"}, "like 2.3.0")],
)
def test_options_that_nobody_can_mean_are_refused(options: dict[str, str], hint: str) -> None:
    with pytest.raises(ProfileError, match=hint):
        TfliteFromExportedProgram(**options)  # type: ignore[arg-type]


class Inverse(torch.nn.Module):
    """An operation that litert_torch has no lowering for."""

    def forward(
        self, sample: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.linalg.eigvals(sample @ sample.transpose(2, 3)).real
        return sample + found[..., None], input_ids.float() @ torch.ones(5, 512)


def test_an_operation_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    contract = Contract("unet", tiny.CONTRACT.inputs, tiny.CONTRACT.outputs, ())
    fixed = Contract(
        contract.component,
        contract.inputs,
        contract.outputs,
        tuple(type(a)(a.name, a.opt, a.opt, a.opt, a.multiple_of) for a in tiny.CONTRACT.axes),
    )
    program = tiny.make_program(tmp_path, Inverse(), fixed)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(StageError, match="eigvals") as caught:
        TfliteFromExportedProgram().run({"program": program}, StageContext(work, "unet", fixed))
    assert "tflite_from_exported_program: unet" in caught.value.where


def test_what_a_converter_raises_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import litert_torch

    def fail(*args: object, **more: object) -> None:
        raise KeyError("a bug of theirs")

    monkeypatch.setattr(litert_torch.Converter, "convert", fail)
    with pytest.raises(StageError, match="KeyError: 'a bug of theirs'") as caught:
        tiny.make_tflite(tmp_path, TfliteFromExportedProgram())
    assert "unet" in caught.value.where and caught.value.remedy


@pytest.fixture
def two_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model counts as one of 2 GiB."""
    monkeypatch.setattr(tflite, "LARGE_FILE_BYTES", 1000)


@pytest.mark.usefixtures("two_gib")
def test_a_file_past_2_gib_is_marked_with_what_it_needs(tmp_path: Path) -> None:
    said: list[str] = []
    artifact = tiny.copied(tmp_path)
    context = StageContext(tmp_path, "unet", tiny.CONTRACT, say=said.append)
    TfliteFromExportedProgram()._check_size(artifact.path, tiny.CONTRACT, context)
    assert "64-bit" in said[0] and "INT8" in said[0]
    facts = tflite.write_facts(artifact.path, tiny.CONTRACT, "fp32")
    assert tflite.LARGE_FILE_RUNTIME in facts["large_file"]["needs"]
    assert "fp16" in facts["large_file"]["otherwise"][0]
    tflite.validate(artifact.path)


@pytest.mark.usefixtures("two_gib")
@pytest.mark.parametrize(("minimum", "refused"), [("2.1", True), ("2.3.0", False), ("3", False)])
def test_a_file_past_2_gib_is_refused_where_an_older_runtime_must_open_it(
    minimum: str, refused: bool, tmp_path: Path
) -> None:
    stage = TfliteFromExportedProgram(minimum_runtime=minimum)
    path = tiny.shared_tflite().path
    context = StageContext(tmp_path, "unet", tiny.CONTRACT)
    if not refused:
        stage._check_size(path, tiny.CONTRACT, context)
        return
    with pytest.raises(StageError, match=r"minimum_runtime is 2\.1") as caught:
        stage._check_size(path, tiny.CONTRACT, context)
    assert "fp16" in caught.value.remedy and "INT8" in caught.value.remedy


def test_a_file_that_lost_an_input_is_not_handed_on() -> None:
    more = tiny.CONTRACT.inputs[0]
    contract = Contract(
        "unet",
        (*tiny.CONTRACT.inputs, type(more)("mask", "float32", more.dims)),
        tiny.CONTRACT.outputs,
        tiny.CONTRACT.axes,
    )
    path = tiny.shared_tflite().path
    with pytest.raises(StageError, match="mask"):
        tflite_from_exported_program._check_ends(path, contract, [tiny.USUAL])


def test_temporary_files_of_the_converter_do_not_stay() -> None:
    before = set(Path(tempfile.gettempdir()).iterdir())
    tiny.shared_tflite()
    left = {p.name for p in set(Path(tempfile.gettempdir()).iterdir()) - before}
    assert not [name for name in left if "litert" in name or "tflite" in name]
