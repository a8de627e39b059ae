"""The ONNX stage: the contract's names and axes, parity, external data, fp16 by measurement."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from onnxscript import rewriter

from diffoundry.errors import DiffoundryError, ProfileError, StageError
from diffoundry.exporters import onnx_from_exported_program
from diffoundry.exporters.onnx_from_exported_program import OnnxFromExportedProgram
from diffoundry.formats import onnx
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.types import Array, Artifact
from tests.compilers import small_network as small


def _infer(artifact: Artifact, feeds: dict[str, Array]) -> Array:
    session = OnnxSession().open(artifact, small.CONTRACT, "cpu", 1)
    return session.infer(feeds)["model_output"]


def _dims(value: object) -> list[str | int]:
    dims = value.type.tensor_type.shape.dim  # type: ignore[attr-defined]
    return [dim.dim_param or dim.dim_value for dim in dims]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 16), (4, 64, 24)])
def test_fp32_computes_what_pytorch_computes(shape: tuple[int, int, int]) -> None:
    feeds = small.feeds_at(*shape)
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(_infer(small.shared_onnx(), feeds), expected, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_edges_are_float32_and_named_as_in_the_contract(precision: str) -> None:
    model = onnx.read_model(small.shared_onnx(precision).path)
    edges = {v.name: _dims(v) for v in [*model.graph.input, *model.graph.output]}
    assert edges == {
        spec.name: [dim if isinstance(dim, int) else str(dim) for dim in spec.dims]
        for spec in (*small.CONTRACT.inputs, *small.CONTRACT.outputs)
    }
    kinds = {v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    assert kinds == {1}


def test_the_opset_is_the_one_asked_for() -> None:
    (opset,) = onnx.read_model(small.shared_onnx().path).opset_import
    assert (opset.domain, opset.version) == ("", OnnxFromExportedProgram().opset)


def test_the_rule_that_is_left_out_would_have_changed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = rewriter._DEFAULT_REWRITE_RULES
    with onnx_from_exported_program._without_quadratic_rules():
        left = rewriter._DEFAULT_REWRITE_RULES
    assert {rule.name for rule in rules} - {rule.name for rule in left} == {"SlicesSplit"}
    assert rewriter._DEFAULT_REWRITE_RULES is rules
    monkeypatch.setattr(
        onnx_from_exported_program, "_without_quadratic_rules", contextlib.nullcontext
    )
    made = small.make_onnx(tmp_path, small.make_program(tmp_path), OnnxFromExportedProgram())
    assert onnx.digest(made.path) == onnx.digest(small.shared_onnx().path)


def test_weights_above_the_threshold_are_external_and_compute_the_same() -> None:
    feeds = small.feeds_at()
    artifact = small.shared_onnx(external=True)
    assert (artifact.path / onnx.DATA_FILE).stat().st_size > 1024
    np.testing.assert_array_equal(_infer(artifact, feeds), _infer(small.shared_onnx(), feeds))


def test_fp16_is_about_half_the_size_and_close() -> None:
    half, single = small.shared_onnx("fp16"), small.shared_onnx()
    weights = [
        sum(len(t.raw_data) for t in onnx.read_model(a.path).graph.initializer)
        for a in (half, single)
    ]
    assert weights[0] < 0.65 * weights[1]
    feeds = small.feeds_at(seed=7)
    exact, found = _infer(single, feeds), _infer(half, feeds)
    assert 0 < np.abs(exact - found).max() < 0.02 * np.abs(exact).max()


def test_the_phase_of_the_timestep_stays_fp32_and_is_listed() -> None:
    document = onnx.read_precision(small.shared_onnx("fp16").path)
    assert document is not None
    phase = {e["node"]: e["figures"] for e in document["stays_fp32"] if e["reason"] == "phase"}
    assert {"/Sin", "/Cos"} <= set(phase)
    assert 500 < phase["/Sin"]["argument_peak"] < 1000
    assert document["sqnr_db"]["model_output"] > document["sqnr_db_all_fp16"]["model_output"] + 5


def test_values_beyond_fp16_stay_fp32_and_the_result_is_finite(tmp_path: Path) -> None:
    program = small.make_program(tmp_path, gain=1e5)
    recording = small.make_recording(tmp_path, gain=1e5)
    stage = OnnxFromExportedProgram(precision="fp16")
    artifact = small.make_onnx(tmp_path, program, stage, recording=recording)
    document = onnx.read_precision(artifact.path)
    assert document is not None
    ranged = [e for e in document["stays_fp32"] if e["reason"] == "range"]
    assert {e["op_type"] for e in ranged} == {"Mul", "Div"}
    assert all(e["figures"]["peak"] > 32752 for e in ranged)
    assert document["sqnr_db_all_fp16"]["model_output"] == -300.0
    feeds = small.feeds_at()
    expected = small.reference(small.small_network(1e5), feeds)
    np.testing.assert_allclose(_infer(artifact, feeds), expected, atol=0.02)


def test_a_higher_target_keeps_more_nodes_until_it_is_reached(tmp_path: Path) -> None:
    program, recording = small.make_program(tmp_path), small.make_recording(tmp_path)
    plain = onnx.read_precision(small.shared_onnx("fp16").path)
    assert plain is not None
    target = plain["sqnr_db"]["model_output"] + 2
    stage = OnnxFromExportedProgram(precision="fp16", target_sqnr_db=target, max_fp32_share=0.6)
    artifact = small.make_onnx(tmp_path, program, stage, recording=recording)
    document = onnx.read_precision(artifact.path)
    assert document is not None
    assert document["target_reached"]
    assert document["sqnr_db"]["model_output"] >= target
    added = [e for e in document["stays_fp32"] if e["reason"] == "sensitivity"]
    assert added
    for entry in added:
        assert entry["figures"]["sqnr_db_with"] > entry["figures"]["sqnr_db_without"]


def test_the_trials_are_bounded_and_a_missed_target_is_said(tmp_path: Path) -> None:
    program, recording = small.make_program(tmp_path), small.make_recording(tmp_path)
    stage = OnnxFromExportedProgram(precision="fp16", target_sqnr_db=150, max_trials=5)
    document = onnx.read_precision(
        small.make_onnx(tmp_path, program, stage, recording=recording).path
    )
    assert document is not None
    assert not document["target_reached"] and document["trials"] <= 8


@pytest.mark.parametrize("options", [{"precision": "int4"}, {"opset": 9}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ProfileError):
        OnnxFromExportedProgram(**options)  # type: ignore[arg-type]


def test_a_graph_that_lost_an_input_is_refused(tmp_path: Path) -> None:
    """The contract says four inputs, the program has three."""
    import dataclasses

    from diffoundry.types import StageContext, TensorSpec

    program = small.make_program(tmp_path)
    more = (*small.CONTRACT.inputs, TensorSpec("timestep_cond", "float32", (small.BATCH, 8)))
    contract = dataclasses.replace(small.CONTRACT, inputs=more)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(DiffoundryError, match="timestep_cond") as raised:
        OnnxFromExportedProgram().run({"program": program}, StageContext(work, "unet", contract))
    assert isinstance(raised.value, StageError)


def test_an_operator_that_cannot_be_converted_is_named_with_the_cause() -> None:
    """torch.onnx converts attention over four dimensions only."""
    import torch

    from diffoundry.compilers.exported_program_from_torch import trace
    from diffoundry.exporters.onnx_from_exported_program import write_fp32
    from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    spec = TensorSpec("x", "float32", (AxisRef("batch"), 3, 4))
    axis = Axis("batch", 1, 1, 4)
    contract = Contract("unet", (spec,), (TensorSpec("y", "float32", spec.dims),), (axis,))
    with pytest.raises(StageError, match="only 4D"):
        write_fp32(trace(Flat(), contract), contract, Path("nowhere"), 18, 10**9)
