"""What the converter does to weights beside a norm, and that fences keep it from that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compression.layers import weight_scale
from diffoundry.errors import ArtifactError
from diffoundry.exporters import tflite_convert, tflite_fences
from diffoundry.exporters.tflite_integer import apply_plan
from diffoundry.formats import tflite
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan
from diffoundry.formats.tflite_editing import Model
from diffoundry.runtimes.tflite_interpreter import OpenedTflite
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

EDGE = (AxisRef("batch"), 6, 32)
CONTRACT = Contract(
    "text_encoder",
    (TensorSpec("states", "float32", EDGE),),
    (TensorSpec("found", "float32", EDGE),),
    (Axis("batch", 1, 1, 1),),
)


class Normed(torch.nn.Module):
    """A norm with a scale, a linear layer, and a factor, as an attention's query has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.query = torch.nn.Linear(32, 32)
        torch.nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.query(self.norm(states)) * 0.25


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Normed().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def plan(weights: dict[str, np.ndarray]) -> QuantPlan:
    scale = {"query.weight_scale": weight_scale(weights["query.weight"], "minmax")}
    layer = LayerPlan("query", "linear", "weight_only")
    return QuantPlan("text_encoder", "by hand", {}, (layer,), scale)


def convert(network: torch.nn.Module, folder: Path, fenced: set[str]) -> Path:
    file = folder / "fp32.tflite"
    program = trace(network, CONTRACT, dynamic=False)
    tflite_convert.convert(program, CONTRACT, [{"batch": 1}], file, fenced)
    return file


def kinds(file: Path) -> list[str]:
    return [graph.kind(one) for graph in Model.read(file).graphs() for one in graph.operators()]


def test_without_fences_the_plan_s_weights_are_not_in_the_file(
    network: torch.nn.Module, plan: QuantPlan, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Should this pass one day, the converter folds no more, and fences may go."""
    file = convert(network, tmp_path, set())
    with pytest.raises(ArtifactError, match="query"):
        apply_plan(file, tmp_path / "model.tflite", plan, weights)


def test_behind_fences_they_are_and_the_fences_go(
    network: torch.nn.Module, plan: QuantPlan, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = convert(network, tmp_path, {"query"})
    assert kinds(file).count("MAXIMUM") == 2
    target = tmp_path / tflite.MODEL_FILE
    apply_plan(file, target, plan, weights)
    assert "MAXIMUM" not in kinds(target)
    assert tflite.integer_layers(target) == {"query": "weight_only"}
    states = np.random.default_rng(0).standard_normal((1, 6, 32)).astype(np.float32)
    found = OpenedTflite(target, CONTRACT, "cpu", 1).infer({"states": states})["found"]
    with torch.inference_mode():
        wanted = network(torch.from_numpy(states)).numpy()
    assert 0 < np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_fence_at_an_output_leaves_the_output_s_tensor(
    network: torch.nn.Module, tmp_path: Path
) -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = network.query

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.query(states)

    file = convert(Bare().eval(), tmp_path, {"query"})
    model = Model.read(file)
    assert sum(tflite_fences.tear_down(graph) for graph in model.graphs()) == 2
    target = tmp_path / tflite.MODEL_FILE
    model.write(target)
    tflite.validate(target)
    states = np.ones((1, 6, 32), np.float32)
    found = OpenedTflite(target, CONTRACT, "cpu", 1).infer({"states": states})["found"]
    with torch.inference_mode():
        wanted = network.query(torch.from_numpy(states)).numpy()  # type: ignore[operator]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
