"""Tracing: the contract's axes move, others are constants, and what cannot be traced says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.compilers.exported_program_from_torch import (
    ExportedProgramFromTorch,
    example_shape,
    trace,
)
from diffoundry.errors import ContractError, StageError
from diffoundry.formats import exported_program
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import open_pipeline
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    StageContext,
    TensorSpec,
)
from tests.compilers import small_network as small
from tests.mini_pipelines import make_named


def _contract(axis: Axis, dim: AxisRef) -> Contract:
    spec = TensorSpec("x", "float32", (dim, 3))
    return Contract("unet", (spec,), (TensorSpec("y", "float32", (dim, 3)),), (axis,))


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 64, 8), (3, 40, 24)])
def test_a_program_runs_at_shapes_that_were_never_traced(shape: tuple[int, int, int]) -> None:
    program = trace(small.small_network(), small.CONTRACT)
    feeds = small.feeds_at(*shape)
    # Without torch's own guards: what is exported is the graph.
    found = program.module(check_guards=False)(*map(torch.from_numpy, feeds.values()))
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_an_axis_of_one_size_is_a_constant() -> None:
    program = trace(torch.nn.ReLU(), _contract(Axis("batch", 2, 2, 2), AxisRef("batch")))
    assert not program.range_constraints


def test_a_fixed_program_has_the_opt_shape() -> None:
    program = trace(small.small_network(), small.CONTRACT, dynamic=False)
    (sample, *_) = [n for n in program.graph.nodes if n.name == "sample"]
    assert tuple(sample.meta["val"].shape) == (1, 4, 4, 4)


def test_examples_avoid_one_and_equal_sizes() -> None:
    axes = small.CONTRACT.axes
    shape = example_shape(small.CONTRACT, axes)
    steps = [shape[axis.name] // axis.multiple_of for axis in axes]
    assert 1 not in steps and len(set(steps)) == 3
    for axis in axes:
        assert axis.problem_with(shape[axis.name]) is None


def test_an_axis_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ContractError, match="multiple of 4"):
        trace(torch.nn.ReLU(), _contract(Axis("height", 6, 6, 60, 6), AxisRef("height", divisor=4)))


def test_a_module_that_needs_one_size_is_refused_with_the_reason() -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.shape[0] == 2 else x * 2

    with pytest.raises(StageError, match="batch"):
        trace(Picky(), _contract(Axis("batch", 1, 2, 8), AxisRef("batch")))


def test_the_stage_traces_a_component_of_a_pipeline(tmp_path: Path) -> None:
    source = open_pipeline(str(make_named(tmp_path / "model", "lcm")))
    axes = (Axis("batch", 1, 1, 4), Axis("height", 8, 8, 8, 4), Axis("width", 8, 8, 8, 4))
    contract = contract_for(source, "text_encoder", axes)
    module = Artifact(
        ArtifactType("torch_module"), source.components["text_encoder"].folder, "sha256:0"
    )
    work = tmp_path / "work"
    work.mkdir()
    stage = ExportedProgramFromTorch()
    produced = stage.run({"module": module}, StageContext(work, "text_encoder", contract))
    exported_program.validate(produced["program"].path)
    program = exported_program.load(work)
    assert [spec.arg.name for spec in program.graph_signature.input_specs][-1] == "input_ids"
