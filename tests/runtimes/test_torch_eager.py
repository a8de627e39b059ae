"""PyTorch behind the Session interface: the reference that everything is compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.errors import ContractError
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import open_pipeline
from diffoundry.runtimes.torch_eager import OpenedModule, TorchEager
from diffoundry.types import Artifact, ArtifactType, Axis
from tests.compilers import small_network as small
from tests.mini_pipelines import make_named


def _session() -> OpenedModule:
    return OpenedModule(small.small_network(), small.CONTRACT, threads=1)


def test_it_computes_what_the_module_computes() -> None:
    feeds = small.feeds_at()
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(_session().infer(feeds)["model_output"], expected, atol=1e-6)


def test_probe_gives_leaf_modules_in_execution_order() -> None:
    found = _session().probe(small.feeds_at())
    assert list(found) == ["time", "conv_in", "block.norm", "block.conv", "block.query", "conv_out"]
    assert list(_session().probe(small.feeds_at(), ["conv_out", "time"])) == ["time", "conv_out"]
    with pytest.raises(ContractError, match="no_such"):
        _session().probe(small.feeds_at(), ["no_such"])


def test_probe_leaves_no_hooks() -> None:
    session = _session()
    session.probe(small.feeds_at())
    assert not any(module._forward_hooks for module in session._module.modules())


def test_precision_is_pinned_during_a_call_and_restored_after() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        used = _session().precision_used()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert used["float32_matmul_precision"] == "highest"
    assert used["weights"] == ["torch.float32"]
    assert used["threads"] == 1


def test_a_component_of_a_pipeline_is_opened_in_contract_order(tmp_path: Path) -> None:
    source = open_pipeline(str(make_named(tmp_path / "model", "lcm")))
    axes = (Axis("batch", 1, 1, 2), Axis("height", 8, 8, 8, 4), Axis("width", 8, 8, 8, 4))
    contract = contract_for(source, "vae_encoder", axes)
    folder = source.components["vae_encoder"].folder
    module = Artifact(ArtifactType("torch_module"), folder, "sha256:0")
    session = TorchEager().open(module, contract, "cpu", 1)
    outputs = session.infer({"image": np.zeros((1, 3, 8, 8), np.float32)})
    assert list(outputs) == [spec.name for spec in contract.outputs]
    contract.check_outputs(outputs, contract.opt_shape())
