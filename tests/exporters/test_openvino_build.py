"""A mini LCM in OpenVINO: each component at two shapes; the whole chain, twice the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.errors import ExitCode
from diffoundry.formats import onnx
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for
from diffoundry.models.pipeline import PipelineSource, open_pipeline
from diffoundry.runtimes.openvino_session import OpenvinoSession
from diffoundry.sessions import open_session
from diffoundry.types import Array, Artifact, ArtifactType, Axis, Contract
from tests.end_to_end.commands import files_of, run_json
from tests.exporters.small_openvino import convert
from tests.mini_pipelines import make_named

COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
SHAPES = ({"batch": 1, "height": 16, "width": 16}, {"batch": 3, "height": 8, "width": 20})
AXES = (Axis("batch", 1, 1, 4), Axis("height", 8, 16, 32, 4), Axis("width", 8, 16, 32, 4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PipelineSource:
    return open_pipeline(str(make_named(tmp_path_factory.mktemp("openvino") / "lcm", "lcm")))


def _feeds(contract: Contract, shape: dict[str, int]) -> dict[str, Array]:
    random = np.random.default_rng(0)
    feeds = {}
    for spec in contract.inputs:
        size = spec.shape(shape)
        whole = spec.dtype == "int64"
        made = random.integers(0, 50, size) if whole else random.standard_normal(size)
        feeds[spec.name] = made.astype(spec.dtype)
    return feeds


def _infer(network: Any, feeds: dict[str, Array]) -> list[Array]:
    import torch

    with torch.inference_mode():
        found = network(*(torch.from_numpy(array) for array in feeds.values()))
    return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize(
    ("component", "split"),
    [*((name, False) for name in COMPONENTS), ("unet", True), ("vae_decoder", True)],
)
def test_a_component_computes_what_pytorch_computes(
    source: PipelineSource, tmp_path: Path, component: str, split: bool
) -> None:
    """`split`: as `split_upsampling` leaves it, against the whole."""
    from diffoundry.compilers.exported_program_from_torch import trace
    from diffoundry.exporters.onnx_from_exported_program import write_fp32
    from diffoundry.models.splits import doubling_convolutions, split_doubling

    contract = contract_for(source, component, AXES)
    network = load_component(source.components[component].folder, component)
    exported = load_component(source.components[component].folder, component)
    if split:
        names = doubling_convolutions(exported)
        assert names
        for name in names:
            split_doubling(exported, name)
    write_fp32(trace(exported, contract), contract, tmp_path, 18, 10**9)
    onnx.canonicalise(tmp_path)
    made = convert(tmp_path, Artifact(ArtifactType("onnx", "fp32"), tmp_path, ""), contract)
    session = open_session(OpenvinoSession(), made, contract, threads=1)
    for shape in SHAPES:
        feeds = _feeds(contract, shape)
        found, expected = list(session.infer(feeds).values()), _infer(network, feeds)
        assert len(found) == len(expected) == len(contract.outputs)
        for one, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, wanted, atol=1e-5 * np.abs(wanted).max())
    for spec in contract.inputs:  # none was dropped: swapping it changes as much as in PyTorch
        other = {**feeds, spec.name: feeds[spec.name][::-1].copy()}
        moved = next(iter(session.infer(other).values())) - found[0]
        wanted = _infer(network, other)[0] - expected[0]
        assert np.abs(wanted).max() > 0, spec.name
        np.testing.assert_allclose(moved, wanted, atol=0.05 * np.abs(wanted).max())


@pytest.mark.slow
def test_the_whole_chain_passes_verifies_and_gives_the_same_bytes_again(
    source: PipelineSource, tmp_path: Path
) -> None:
    bundles = tmp_path / "first", tmp_path / "second"
    for bundle in bundles:
        code, document = run_json(
            bundle.with_suffix(".store"),
            *("build", source.path, "--profile", "openvino-cpu", "--out", bundle),
        )
        assert code == ExitCode.DONE, document
    (variant,) = document["bundle"]["variants"]
    checks = [check for result in variant["parity"] for check in result["checks"]]
    for level in ("call", "nothing_dropped", "shape_range", "sick_numbers", "precision"):
        found = {check["component"] for check in checks if check["level"] == level}
        assert found == set(COMPONENTS), level
    assert {check["status"] for check in checks} <= {"passed", "info"}
    assert files_of(bundles[0]) == files_of(bundles[1])
    engines = {name for name in files_of(bundles[0]) if name.startswith("engines/")}
    folder = "engines/openvino-cpu-fp32"
    assert engines == {f"{folder}/{c}/model.{end}" for c in COMPONENTS for end in ("xml", "bin")}
    code, document = run_json(tmp_path / "another.store", "verify", bundles[0])
    assert code == ExitCode.DONE, document
    assert files_of(bundles[0]) == files_of(bundles[1])
