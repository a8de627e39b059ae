"""A fused model computes what the model did, in fewer and other operators."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters import fuse_onnx
from diffoundry.exporters.fuse_onnx import RULES, FuseOnnx
from diffoundry.exporters.fusions.editing import Graph
from diffoundry.formats import canonical, onnx
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.types import Artifact, ArtifactType, StageContext
from tests.exporters.fusions import fusible
from tests.exporters.fusions.fusible import SHAPES

EXPECTED = {"attention": 2, "gelu": 1, "fast_conv": 3}


def _operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in onnx.read_model(artifact.path).graph.node)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rules", [*((rule,) for rule in EXPECTED), tuple(RULES)], ids="+".join)
def test_every_rule_rewrites_and_changes_no_more_than_rounding(
    rules: tuple[str, ...], shape: dict[str, int]
) -> None:
    said: list[str] = []
    fused, feeds = fusible.fuse(said=said, rules=rules), fusible.feeds_at(shape)
    exact, found = fusible.infer(fusible.fp32(), feeds), fusible.infer(fused, feeds)
    assert np.abs(exact).max() > 0.3
    assert np.abs(exact - found).max() < 5e-6 * np.abs(exact).max()
    for rule in EXPECTED.keys() & set(rules):
        assert f"{rule} {EXPECTED[rule]}×" in said[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_model_is_as_near_to_pytorch_as_the_limits_ask(shape: dict[str, int]) -> None:
    feeds = fusible.feeds_at(shape, 1)
    with torch.inference_mode():
        exact = fusible.network()(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    found = fusible.infer(fusible.fuse(), feeds)
    assert np.abs(exact - found).max() < 1e-5 * np.abs(exact).max()


def test_what_is_left_has_no_scores_no_error_function_and_no_enlarged_plane() -> None:
    found = _operators(fusible.fuse())
    assert found["MultiHeadAttention"] == 2 and found["Gelu"] == 1
    assert found["ConvTranspose"] == 3
    assert not {"Softmax", "Erf", "Resize"} & found.keys()


def test_names_are_the_modules_and_the_second_time_changes_nothing() -> None:
    fused = fusible.fuse()
    names = [node.name for node in onnx.read_model(fused.path).graph.node]
    assert "/large/MatMul" in names and "/self_attention/MultiHeadAttention" in names
    again = fusible.fuse(fused)
    assert onnx.read_model(again.path) == onnx.read_model(fused.path)


def test_a_runtime_is_told_to_leave_the_layout_only_where_convolutions_became_products() -> None:
    assert onnx.has_plain_layout(fusible.fuse().path)
    assert not onnx.has_plain_layout(fusible.fuse(rules=("attention", "gelu")).path)
    assert not onnx.has_plain_layout(fusible.fp32().path)


def test_the_same_model_gives_the_same_bytes() -> None:
    first, second = fusible.fuse(), fusible.fuse()
    assert canonical.tree_digest(first.path) == canonical.tree_digest(second.path)


def test_an_integer_model_keeps_its_layers_and_is_fused_around_them() -> None:
    model, said = fusible.int8(), []
    fused = fusible.fuse(model, said)
    assert all(f"{rule} {n - (rule == 'fast_conv')}×" in said[-1] for rule, n in EXPECTED.items())
    layers = onnx.integer_layers(fused.path)
    assert layers == onnx.integer_layers(model.path) and len(layers) == 10
    assert set(onnx.integer_nodes(fused.path).values()) == set(layers)
    opened = OnnxSession().open(fused, fusible.CONTRACT, "cpu", 1)
    assert opened.precision_used()["integer_layers"] == sorted(layers)
    for shape in SHAPES:
        feeds = fusible.feeds_at(shape, 2)
        exact, found = fusible.infer(model, feeds), fusible.infer(fused, feeds)
        # A value on the edge between two steps may fall on the other side.
        assert ((exact - found) ** 2).sum() < 1e-4 * (exact**2).sum()


def test_a_rule_that_takes_an_int8_layer_away_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(graph: Graph) -> int:
        (node,) = (n for n in graph.graph if n.name == "/gate/MatMulIntegerToFloat")
        taken = graph.nodes("QuantizeLinear")[0].inputs[0]
        graph.replace(node.outputs[0], graph.node(node, "Concat", [taken, taken], axis=-1))
        graph.clean()
        return 1

    monkeypatch.setattr(fuse_onnx, "RULES", {"breaks": breaks})
    with pytest.raises(StageError, match="gate"):
        fusible.fuse(fusible.int8(), rules=("breaks",))


def test_weights_lie_beside_the_graph_and_are_read_from_there() -> None:
    fused = fusible.fuse(external_data_threshold_bytes=1000)
    assert (fused.path / onnx.DATA_FILE).stat().st_size > 1_000_000
    feeds = fusible.feeds_at(SHAPES[0])
    inside = fusible.infer(fusible.fuse(external_data_threshold_bytes=10**9), feeds)
    assert np.array_equal(fusible.infer(fused, feeds), inside)


def test_without_a_contract_only_what_needs_no_sizes_is_rewritten(tmp_path: Path) -> None:
    said: list[str] = []
    context = StageContext(tmp_path, say=said.append)
    FuseOnnx().run({"model": fusible.fp32()}, context)
    assert all(f"{rule} {int(rule == 'gelu')}×" in said[-1] for rule in EXPECTED)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ProfileError, match="winograd"):
        FuseOnnx(rules=("winograd",))
    with pytest.raises(ProfileError, match="fp16"):
        FuseOnnx(precision="fp16")  # type: ignore[arg-type]
    assert FuseOnnx("int8").inputs()["model"] == (ArtifactType("onnx", "int8"),)
    assert FuseOnnx("int8").outputs()["model"] == ArtifactType("onnx", "int8")
    assert dataclasses.replace(FuseOnnx(), rules=("gelu",)).rules == ("gelu",)
