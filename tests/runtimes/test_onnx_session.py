"""onnxruntime behind the Session interface: results, probe, precision, damage."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

from diffoundry.discovery import runtime_named
from diffoundry.errors import ArtifactError, ContractError, DeferredError, MissingToolError
from diffoundry.formats import onnx
from diffoundry.runtimes import onnx_session
from diffoundry.runtimes.onnx_session import OnnxSession, OpenedOnnx
from diffoundry.sessions import choose_opening
from diffoundry.types import Artifact, ArtifactType
from tests.compilers import small_network as small
from tests.exporters import small_quantized as quantized


def _open(artifact: Artifact) -> OpenedOnnx:
    return OnnxSession().open(artifact, small.CONTRACT, "cpu", 1)


def test_the_same_feeds_give_the_same_bits() -> None:
    session, feeds = _open(small.shared_onnx()), small.feeds_at()
    first, second = session.infer(feeds), session.infer(feeds)
    np.testing.assert_array_equal(first["model_output"], second["model_output"])


@pytest.mark.parametrize("external", [False, True])
def test_probe_gives_inner_values_in_execution_order(external: bool) -> None:
    import torch

    session, feeds = _open(small.shared_onnx(external=external)), small.feeds_at()
    found = session.probe(feeds)
    assert list(found) == session.value_names()
    np.testing.assert_allclose(
        found["model_output"], session.infer(feeds)["model_output"], atol=1e-6
    )
    expected = small.small_network().conv_in(torch.from_numpy(feeds["sample"])).numpy()
    np.testing.assert_allclose(found["/conv_in/Conv"], expected, atol=1e-6)
    names = ["/conv_out/Conv" if "/conv_out/Conv" in found else "model_output", "/conv_in/Conv"]
    assert list(session.probe(feeds, names)) == names[::-1]


def test_probe_refuses_an_unknown_name() -> None:
    with pytest.raises(ContractError, match="no_such_value"):
        _open(small.shared_onnx()).probe(small.feeds_at(), ["no_such_value"])


def test_the_precision_is_read_back_from_the_kernels_that_ran() -> None:
    used = _open(small.shared_onnx()).precision_used()
    assert used["providers"] == ["CPUExecutionProvider"]
    assert set(used["kernels_by_provider"]) == {"CPUExecutionProvider"}
    assert set(used["kernels_by_type"]) == {"float"} and not used["float16_kernels"]
    assert used["threads"] == 1


def test_reading_the_precision_never_holds_two_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    session, feeds = _open(small.shared_onnx()), small.feeds_at()
    before = session.infer(feeds)["model_output"]
    made = onnx_session._create

    def create(*arguments: object) -> object:
        assert not hasattr(session, "_session")
        return made(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_session, "_create", create)
    session.precision_used()
    np.testing.assert_array_equal(session.infer(feeds)["model_output"], before)


def test_an_fp16_graph_on_a_cpu_says_what_computes_in_float32() -> None:
    used = _open(small.shared_onnx("fp16")).precision_used()
    assert used["kernels_by_type"]["float"] > 0
    assert "float32" in used["note"]


def test_nothing_is_written_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip # noqa: E501
    model = small.copied(small.shared_onnx(external=True), tmp_path / "bundle")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = onnx.digest(model.path)
    session = _open(model)
    session.infer(small.feeds_at())
    session.probe(small.feeds_at())
    session.precision_used()
    session.close()
    assert onnx.digest(model.path) == before
    assert not list(elsewhere.iterdir())


def test_another_kind_of_artifact_is_refused() -> None:
    artifact = Artifact(ArtifactType("tflite"), small.shared_onnx().path, "")
    with pytest.raises(ArtifactError, match="an onnx artifact"):
        _open(artifact)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    model = small.copied(small.shared_onnx(), tmp_path)
    file = model.path / onnx.MODEL_FILE
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        _open(model)


def test_an_operator_that_onnxruntime_lacks_is_named(tmp_path: Path) -> None:
    model = small.copied(small.shared_onnx(), tmp_path)
    proto = onnx.read_model(model.path)
    proto.opset_import.add(domain="nobody", version=1)
    proto.graph.node[-1].domain = "nobody"
    onnx.write_model(proto, model.path)
    with pytest.raises(ArtifactError, match="nobody"):
        _open(model)


def test_a_shape_that_the_model_cannot_take_is_named() -> None:
    feeds = small.feeds_at()
    feeds["sample"] = feeds["sample"][:, :3]
    with pytest.raises(ContractError, match="sample"):
        _open(small.shared_onnx()).infer(feeds)


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    problem = OnnxSession().unavailable("cpu")
    assert isinstance(problem, MissingToolError) and "diffoundry[onnx]" in problem.remedy
    problem = OnnxSession().unavailable("cuda")
    assert isinstance(problem, MissingToolError) and "diffoundry[onnx-gpu]" in problem.remedy


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_here_is_deferred_and_the_cpu_stands_in(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(onnx_session, "_cuda_devices", lambda: 0)
    problem = OnnxSession().unavailable(device)
    assert isinstance(problem, DeferredError) and device in problem.where
    opening = choose_opening(
        runtime_named, "onnx_session", small.shared_onnx(), small.CONTRACT, device
    )
    assert opening.device == "cpu" and opening.stand_in is not None
    assert "GPU's kernels round differently" in opening.stand_in.note
    assert opening.open().infer(small.feeds_at())["model_output"].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_falls_back_without_a_word_is_no_success(device: str) -> None:
    import onnxruntime

    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("onnxruntime-gpu is installed here")
    file = onnx.model_file(small.shared_onnx().path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeferredError, match="fell back to CPUExecutionProvider"):
            onnx_session._create(file, file, onnxruntime.SessionOptions(), device)


def test_tensorfloat_32_is_off_for_tensorrt_unless_someone_turned_it_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert onnx_session._tf32("tensorrt") == "on"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert (onnx_session._tf32("tensorrt"), onnx_session._tf32("cuda")) == ("off", "off")


def test_cuda_with_a_device_needs_the_gpu_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnx_session, "_cuda_devices", lambda: 1)
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here")
    for device in ("cuda", "tensorrt"):
        assert isinstance(OnnxSession().unavailable(device), MissingToolError)


@pytest.mark.gpu
def test_cuda_computes_in_full_float32() -> None:
    problem = OnnxSession().unavailable("cuda")
    if problem is not None:
        pytest.skip(str(problem))
    session = OnnxSession().open(small.shared_onnx(), small.CONTRACT, "cuda")
    feeds = small.feeds_at()
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(session.infer(feeds)["model_output"], expected, atol=1e-5)
    assert session.precision_used()["kernels_by_provider"]["CUDAExecutionProvider"] > 0


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_the_layers_that_ran_in_integer_kernels_are_read_back(scheme: str, outputs: bool) -> None:
    plan = quantized.make_plan(scheme, outputs)
    planned = sorted(entry.module for entry in plan.layers if entry.integer_kernel)
    session = OnnxSession().open(quantized.quantize(plan), quantized.CONTRACT, "cpu", 1)
    used = session.precision_used()
    assert used["integer_layers"] == planned
    assert used["kernels_by_type"].get("int8", 0) == len(planned)


def test_pairs_of_q_and_dq_are_said_to_compute_in_float() -> None:
    made = quantized.quantize(quantized.make_plan(), form="qdq")
    used = OnnxSession().open(made, quantized.CONTRACT, "cpu", 1).precision_used()
    assert used["integer_layers"] == [] and set(used["kernels_by_type"]) == {"float"}
