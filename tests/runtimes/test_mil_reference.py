"""The runtime: parity with PyTorch, shapes, functions, images, and what it says about itself."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.embedded import SHAPES_LCM
from diffoundry.errors import ArtifactError, ContractError, MissingToolError, UsageError
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
from diffoundry.runtimes.mil_reference import NOTE, MilReference, OpenedMil
from diffoundry.sessions import open_session
from diffoundry.types import Array, Artifact, ArtifactType, Contract
from tests.compilers import small_network as small
from tests.runtimes.mil import small_packages as packages
from tests.runtimes.mil.mil_cases import rand


def opened(artifact: Artifact, contract: Contract = small.CONTRACT) -> OpenedMil:
    return MilReference().open(artifact, contract, "cpu", threads=1)


def psnr_db(found: Array, wanted: Array) -> float:
    error = float(((found.astype(np.float64) - wanted) ** 2).mean())
    return 10 * float(np.log10(np.abs(wanted).max() ** 2 / error))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return packages.small_package(tmp_path_factory.mktemp("mil"), request.param)


def test_it_computes_what_pytorch_computes(network: Artifact) -> None:
    session = open_session(MilReference(), network, small.CONTRACT)
    feeds = small.feeds_at()
    wanted = small.reference(small.small_network(), feeds)
    found = session.infer(feeds)["model_output"]
    assert found.dtype == np.float32
    if network.type.precision == "fp32":
        assert np.abs(found - wanted).max() < 1e-5
    else:
        assert np.abs(found - wanted).max() > 1e-5
        assert psnr_db(found, wanted) > 35
    np.testing.assert_array_equal(found, session.infer(feeds)["model_output"])
    session.close()


def test_probe_gives_every_value_in_execution_order(network: Artifact) -> None:
    session, feeds = opened(network), small.feeds_at()
    values = session.probe(feeds)
    assert list(values) == session.value_names()
    np.testing.assert_array_equal(values["model_output"], session.infer(feeds)["model_output"])
    first, *_, last = values
    chosen = session.probe(feeds, [last, first])
    assert list(chosen) == [first, last]
    stored = {str(value.dtype) for value in values.values()}
    assert ("float16" in stored) == (network.type.precision == "fp16")
    with pytest.raises(ContractError, match="probe of nothing"):
        session.probe(feeds, ["nothing"])


def test_it_says_what_it_computes_in(network: Artifact) -> None:
    used = opened(network).precision_used()
    half = network.type.precision == "fp16"
    assert used["compute"] == (["float32", "float16"] if half else ["float32"])
    assert used["arithmetic"] == "fp32" and used["threads"] == 1 and used["note"] == NOTE
    assert ("fp16" in used["storage"]) == ("fp16" in used["constants"]) == half


def test_overflow_shows_where_it_begins(tmp_path: Path) -> None:
    session = opened(packages.small_package(tmp_path, "fp16", gain=1e5))
    values = session.probe(small.feeds_at())
    bad = next(name for name, value in values.items()
               if value.dtype.kind == "f" and not np.isfinite(value).all())  # fmt: skip
    assert bad.startswith("mul")
    assert np.abs(values["model_output"]).max() > 0 or np.isnan(values["model_output"]).any()


@pytest.mark.parametrize("kind", ["fixed", "enumerated", "range"])
def test_the_program_runs_at_the_shapes_that_it_allows_and_no_other(
    kind: str, tmp_path: Path
) -> None:
    allowed = {
        "fixed": [(8, 8)],
        "enumerated": [(8, 8), (8, 12), (16, 8)],
        "range": [(8, 8), (4, 32), (12, 20)],
    }[kind]
    session = opened(packages.picture_package(tmp_path / "p.mlpackage", kind), packages.PICTURE)
    for height, width in allowed:
        latent = rand(1, 3, height, width)
        wanted = packages.reference_picture()(torch.from_numpy(latent)).detach().numpy()
        found = session.infer({"latent": latent})["image"]
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-5
    refused = (36, 8) if kind == "range" else (12, 12)
    with pytest.raises(ContractError, match=r"latent is \[1, 3, "):
        session.infer({"latent": rand(1, 3, *refused)})


def test_of_several_functions_the_one_for_the_shape_runs(tmp_path: Path) -> None:
    session = opened(packages.functions_package(tmp_path), packages.PICTURE)
    for height in (8, 12):
        latent = rand(1, 3, height, 8)
        wanted = packages.reference_picture()(torch.from_numpy(latent)).detach().numpy()
        assert np.abs(session.infer({"latent": latent})["image"] - wanted).max() < 1e-5
    with pytest.raises(ContractError, match="no function takes these shapes") as raised:
        session.infer({"latent": rand(1, 3, 16, 8)})
    assert "[1, 3, 8, 8]" in raised.value.expected and "[1, 3, 12, 8]" in raised.value.expected


def test_an_image_goes_through_bytes(tmp_path: Path) -> None:
    """The network's values leave 0..255 at both ends."""
    session = opened(packages.picture_package(tmp_path / "p.mlpackage", "image"), packages.PICTURE)
    latent = rand(1, 3, 8, 8)
    values = packages.reference_picture(pixels=True)(torch.from_numpy(latent)).detach().numpy()
    assert values.max() > 256 and values.min() < -1
    found = session.infer({"latent": latent})["image"]
    pixels = np.clip(np.rint(values), 0, 255)
    np.testing.assert_allclose(found, pixels / 127.5 - 1, atol=1e-6)


def test_token_ids_of_64_bits_are_taken(tmp_path: Path) -> None:
    table = rand(9, 3)
    session = opened(packages.table_package(tmp_path / "p.mlpackage", table), packages.IDS)
    ids = np.array([[8, 0, 3, 3, 1]])
    found = session.infer({"input_ids": ids})["prompt_embeds"]
    np.testing.assert_array_equal(found, table[ids])
    with pytest.raises(ArtifactError, match="indices"):
        session.infer({"input_ids": ids + 1})


def test_feeds_are_neither_written_to_nor_kept(tmp_path: Path) -> None:
    session = opened(packages.picture_package(tmp_path / "p.mlpackage", "fixed"), packages.PICTURE)
    latent = rand(1, 3, 8, 8)
    latent.setflags(write=False)
    found = session.infer({"latent": latent})["image"]
    found[:] = 0
    assert session.infer({"latent": latent})["image"].any()


def test_the_package_may_lie_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    packages.picture_package(folder / "vae_decoder.mlpackage", "fixed")
    session = opened(packages.artifact(folder), packages.PICTURE)
    assert session.infer({"latent": rand(1, 3, 8, 8)})["image"].shape == (1, 3, 8, 8)


def test_another_component_is_refused(network: Artifact) -> None:
    with pytest.raises(ArtifactError, match="latent -> image"):
        opened(network, packages.PICTURE)
    less = dataclasses.replace(small.CONTRACT, inputs=small.CONTRACT.inputs[:-1])
    with pytest.raises(ArtifactError, match="component"):
        opened(network, less)


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    other = Artifact(ArtifactType("onnx"), tmp_path, "sha256:0")
    assert not MilReference().accepts(other.type)
    with pytest.raises(ArtifactError, match="mlpackage"):
        opened(other)


@pytest.mark.parametrize(("tool", "extra"), [("torch", "build"), ("coremltools", "coreml")])
def test_without_its_tools_the_extra_is_named(
    tool: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == tool else real(name)
    )
    problem = MilReference().unavailable("cpu")
    assert isinstance(problem, MissingToolError) and f"diffoundry[{extra}]" in problem.remedy


def test_it_runs_on_a_cpu_only() -> None:
    assert isinstance(MilReference().unavailable("cuda"), UsageError)
    assert MilReference().unavailable("cpu") is None


@pytest.mark.slow
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_the_embedded_model_keeps_its_values(component: str, tmp_path: Path) -> None:
    """fp32 within 1e-4 of PyTorch, fp16 at 35 dB or better."""
    source = open_pipeline(SHAPES_LCM)
    contract = contract_for(source, component, native_axes(source, {}))
    module = load_component(source.components[component].folder, component)
    program = trace(module, contract, dynamic=False)
    feeds = _ordinary_feeds(contract)
    with torch.inference_mode():
        found = module(*(torch.from_numpy(feed) for feed in feeds.values()))
    wanted = found if isinstance(found, tuple) else (found,)
    for precision in ("fp32", "fp16"):
        package = packages.convert_program(program, contract, tmp_path, precision)
        engine = Artifact(ArtifactType("mlpackage", precision), package, "sha256:0", component)
        outputs = opened(engine, contract).infer(feeds)
        for spec, value in zip(contract.outputs, wanted, strict=True):
            error = np.abs(outputs[spec.name] - value.numpy()).max()
            decibels = psnr_db(outputs[spec.name], value.numpy())
            print(f"{component} {precision} {spec.name}: max_abs {error:.2e}, {decibels:.1f} dB")
            assert decibels >= 35 and (precision == "fp16" or error <= 1e-4)


def _ordinary_feeds(contract: Contract) -> dict[str, Array]:
    feeds = {}
    for spec in contract.inputs:
        shape = spec.shape(contract.opt_shape())
        values = {"input_ids": np.arange(int(np.prod(shape))).reshape(shape) % 60,
                  "timestep": np.full(shape, 499), "image": np.tanh(rand(*shape))}  # fmt: skip
        feeds[spec.name] = values.get(spec.name, rand(*shape)).astype(spec.dtype)
    return feeds
