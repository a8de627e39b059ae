"""A plan in ONNX: every planned layer in INT8 and no other, as the simulator computes it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.compilers.tensorrt_from_onnx import TensorrtFromOnnx
from diffoundry.errors import ArtifactError, ProfileError, StageError
from diffoundry.exporters.quantize_onnx import QuantizeOnnx, apply_plan
from diffoundry.formats import canonical, onnx, tensorrt_build
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.types import Array, Artifact, StageContext
from tests.exporters import small_quantized as small

FORMS = ("integer", "qdq")


def _infer(artifact: Artifact, feeds: dict[str, Array]) -> Array:
    return OnnxSession().open(artifact, small.CONTRACT, "cpu", 1).infer(feeds)["model_output"]


def _operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in onnx.read_model(artifact.path).graph.node)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("outputs", [False, True])
def test_the_file_holds_the_plan_and_computes_what_it_means(
    form: str, scheme: str, outputs: bool
) -> None:
    plan = small.make_plan(scheme, outputs)
    made = small.quantize(plan, form=form)
    assert onnx.integer_layers(made.path) == small.schemes(plan)
    for seed, shape in enumerate(small.SHAPES):
        feeds = small.feeds_at(seed, shape)
        exact, meant = small.reference(feeds), small.reference(feeds, plan)
        found = _infer(made, feeds)
        assert small.sqnr_db(meant, found) > (100 if scheme == "weight_only" else 35)
        assert 20 < small.sqnr_db(exact, meant) - 1 < small.sqnr_db(exact, found)


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_read_one_value_share_what_quantizes_it(form: str) -> None:
    plan = small.only(small.make_plan(), "network.to_q", "network.to_k", "network.to_v")
    found = _operators(small.quantize(plan, form=form))
    assert found["QuantizeLinear"] == 1
    assert found["DequantizeLinear"] == (4 if form == "qdq" else 0)
    wider = tuple(
        dataclasses.replace(entry, activation=dataclasses.replace(entry.activation, high=9.0))
        if entry.module == "network.to_v" and entry.activation
        else entry
        for entry in plan.layers
    )
    other = small.quantize(dataclasses.replace(plan, layers=wider), form=form)
    assert _operators(other)["QuantizeLinear"] == 2


def test_a_convolution_whose_output_has_a_range_needs_no_patches() -> None:
    plan = small.only(small.make_plan(outputs=True), "network.down")
    found = _operators(small.quantize(plan))
    assert found["QLinearConv"] == 1 and not found["MatMulIntegerToFloat"]
    without = _operators(small.quantize(plan, output_grids=False))
    assert without["MatMulIntegerToFloat"] == 1 and not without["QLinearConv"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", ["down", "wide", "gate", "to_q", "to_k"])
def test_a_corrected_bias_replaces_the_old_one(form: str, module: str) -> None:
    rows = small.make_plan().weight_scale(f"network.{module}").size
    bias = np.linspace(-3, 3, rows, dtype=np.float32)
    plan = small.make_plan(biases={f"network.{module}": bias})
    feeds = small.feeds_at(3)
    found = _infer(small.quantize(plan, form=form), feeds)
    assert small.sqnr_db(small.reference(feeds, plan), found) > 35
    assert small.sqnr_db(small.reference(feeds), found) < 35 or module == "to_k"


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_that_names_layers_which_are_not_there_is_refused_with_all_of_them(
    form: str,
) -> None:
    plan = small.make_plan()
    alien = tuple(LayerPlan(f"network.up.{i}.conv", "conv", "weight_only") for i in range(3))
    scales = {f"{e.module}.weight_scale": np.ones(4, np.float32) for e in alien}
    plan = dataclasses.replace(plan, layers=plan.layers + alien, tensors={**plan.tensors, **scales})
    with pytest.raises(ArtifactError, match="another model") as raised:
        small.quantize(plan, form=form)
    assert all(entry.module in str(raised.value) for entry in alien)
    assert "network.down" not in str(raised.value)


def test_scales_of_another_size_are_refused() -> None:
    plan = small.make_plan()
    scales = {**plan.tensors, "network.down.weight_scale": np.ones(3, np.float32)}
    with pytest.raises(StageError, match=r"network\.down") as raised:
        small.quantize(dataclasses.replace(plan, tensors=scales))
    assert "3 output channels" in str(raised.value) and "[8, 16, 3, 3]" in str(raised.value)


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_the_plan_leaves_in_float_stay_so(form: str) -> None:
    plan = small.only(small.make_plan(), "network.wide", "network.table")
    made = small.quantize(plan, form=form)
    assert onnx.integer_layers(made.path) == {
        "network.table": "weight_only",
        "network.wide": "static",
    }


def test_8_bits_that_belong_to_no_layer_are_found() -> None:
    """As the exporters that put Q/DQ on inputs, means and adds leave them."""
    import onnx as library

    made = small.quantize(small.only(small.make_plan(), "network.wide"), form="qdq")
    model = onnx.read_model(made.path)
    (quantizer,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    names = list(quantizer.input[1:])
    more = [
        library.helper.make_node("QuantizeLinear", ["sample", *names], ["q"], "/extra"),
        library.helper.make_node("DequantizeLinear", ["q", *names], ["dq"], "/extra/dq"),
    ]
    for node in model.graph.node:
        node.input[:] = ["dq" if name == "sample" else name for name in node.input]
    for place, node in enumerate(more):
        model.graph.node.insert(place, node)
    onnx.write_model(model, made.path)
    assert onnx.integer_layers(made.path) == {"/extra": "unplanned", "network.wide": "static"}


def test_the_same_plan_gives_the_same_bytes_and_a_quarter_of_the_weights() -> None:
    plan = small.make_plan()
    for form in FORMS:
        first, second = small.quantize(plan, form=form), small.quantize(plan, form=form)
        assert canonical.tree_digest(first.path) == canonical.tree_digest(second.path)
        kinds = Counter[int]()
        for tensor in onnx.read_model(first.path).graph.initializer:
            kinds[tensor.data_type] += len(tensor.raw_data)
        weights = sum(layer.weight.numel() for _, layer in small._layers())  # type: ignore[operator,union-attr]
        assert kinds[3] == weights
        assert kinds[1] < weights


def test_large_weights_lie_beside_the_graph() -> None:
    plan, feeds = small.make_plan(), small.feeds_at()
    made = small.quantize(plan, external_data_threshold_bytes=100)
    assert (made.path / onnx.DATA_FILE).stat().st_size >= 1024
    assert onnx.integer_layers(made.path) == small.schemes(plan)
    np.testing.assert_array_equal(_infer(made, feeds), _infer(small.quantize(plan), feeds))


def _tensorrt(model: Artifact, work: Path) -> Any:
    context = StageContext(work, "unet", small.CONTRACT)
    return TensorrtFromOnnx(precision="int8").run({"model": model}, context)


def test_tensorrt_takes_symmetric_pairs_and_refuses_the_others(tmp_path: Path) -> None:
    plan = small.make_plan(outputs=True)
    symmetric = small.quantize(plan, form="qdq", symmetric=True)
    graph = onnx.read_model(symmetric.path).graph
    stored = {t.name: t for t in graph.initializer if t.name.startswith("zero.")}
    assert {(t.data_type, bytes(t.raw_data)) for t in stored.values()} == {(3, b"\0")}
    (tmp_path / "taken").mkdir()
    build = _tensorrt(symmetric, tmp_path / "taken")["build"].path
    assert tensorrt_build.integer_layers(build) == small.schemes(plan)
    feeds = small.feeds_at()
    meant = small.reference(feeds, small.make_plan(outputs=True, symmetric=True))
    assert small.sqnr_db(meant, _infer(symmetric, feeds)) > 35
    (tmp_path / "refused").mkdir()
    with pytest.raises(StageError, match="uint8"):
        _tensorrt(small.quantize(plan, form="qdq"), tmp_path / "refused")


def test_another_form_is_refused() -> None:
    with pytest.raises(ProfileError, match="form"):
        QuantizeOnnx(form="qoperator")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_a_module_that_is_called_twice_has_its_weight_once(form: str, tmp_path: Path) -> None:
    import onnx as library
    import onnx_ir as ir
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
    edges = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in "xy"]
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["m"], "/c/Conv", pads=[1] * 4),
        helper.make_node("Conv", ["m", "c.weight"], ["y"], "/c/Conv_1", pads=[1] * 4),
    ]
    stored = [numpy_helper.from_array(weight, "c.weight")]
    graph = helper.make_graph(nodes, "twice", edges[:1], edges[1:], stored)
    exact = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    entry = LayerPlan("c", "conv", "static", activation=Range(-40, 40))
    scale = (np.abs(weight).reshape(4, -1).max(1) / 127).astype(np.float32)
    made = ir.from_proto(library.ModelProto.FromString(exact.SerializeToString()))
    apply_plan(made, QuantPlan("unet", "test", {}, (entry,), {"c.weight_scale": scale}), form)
    onnx.save_ir(made, tmp_path, 10**9)
    onnx.canonicalise(tmp_path)
    onnx.validate(tmp_path)
    assert onnx.integer_layers(tmp_path) == {"c": "static"}
    weights = [t for t in onnx.read_model(tmp_path).graph.initializer if t.name.endswith("weight")]
    assert [(t.name, t.data_type) for t in weights] == [("c.weight", TensorProto.INT8)]


def test_weights_beside_the_graph_are_let_go_one_by_one(tmp_path: Path) -> None:
    """Of a large model never more than one layer's float32 weight is mapped."""
    import onnx_ir as ir

    model = ir.load(onnx.model_file(small.shared_fp32().path))
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "model.onnx")
    weights = [value.const_value for value in model.graph.initializers.values()]
    mapped = [one for one in weights if isinstance(one, ir.ExternalTensor)]
    apply_plan(model, small.make_plan(), "integer")
    large = [one for one in mapped if one.nbytes > 1000]
    assert len(large) > 3 and all(one.raw is None for one in large)


def test_a_grid_with_its_zero_in_the_middle_is_written_signed() -> None:
    """OpenVINO multiplies two activations as integers only where neither has a zero point."""
    plan = small.only(small.make_plan(outputs=True), "network.to_q")
    (entry,) = (one for one in plan.layers if one.integer_weight)
    middle = dataclasses.replace(entry, output=Range(-4.0, 4.0 * 127 / 128))
    layers = tuple(middle if one is entry else one for one in plan.layers)
    made = small.quantize(dataclasses.replace(plan, layers=layers), form="qdq")
    graph = onnx.read_model(made.path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    points = [kinds[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(points) == [2, 3]  # the input uint8, the output int8
    feeds = small.feeds_at(1)
    meant = small.reference(feeds, dataclasses.replace(plan, layers=layers))
    assert small.sqnr_db(meant, _infer(made, feeds)) > 35
