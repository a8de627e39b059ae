"""OpenVINO behind the Session interface: results, pinned precision, kept blobs, probe, damage."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    MissingToolError,
    UsageError,
)
from diffoundry.formats import openvino
from diffoundry.formats.recording import ComponentRecording
from diffoundry.parity.blame import find_bad_node
from diffoundry.parity.checks.precision import check_precision
from diffoundry.parity.engine import Engine
from diffoundry.parity.subject import Subject
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.runtimes.openvino_session import (
    OpenedOpenvino,
    OpenvinoSession,
    compile_options,
)
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType, Precision, Session
from tests.compilers import small_network as small
from tests.exporters.small_openvino import ONE_SHAPE, shared_openvino, with_weight


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def _open(artifact: Artifact) -> OpenedOpenvino:
    return OpenvinoSession().open(artifact, small.CONTRACT, "cpu", 1)


def _subject(session: Session, precision: Precision = "fp32") -> Subject:
    held = ComponentRecording(small.CONTRACT, calls=(), swaps=(), shape_calls=(), floors={})
    return Subject(Engine(session, small.CONTRACT), held, precision)


# -- results ------------------------------------------------------------------------------------


def test_the_same_feeds_give_the_same_bits_in_arrays_of_ones_own() -> None:
    session, feeds = _open(shared_openvino()), small.feeds_at()
    first, second = session.infer(feeds), session.infer(feeds)
    np.testing.assert_array_equal(first["model_output"], second["model_output"])
    assert not np.shares_memory(first["model_output"], second["model_output"])


def test_feeds_that_are_not_contiguous_are_taken() -> None:
    session, feeds = _open(shared_openvino()), small.feeds_at()
    turned = {**feeds, "sample": np.asfortranarray(feeds["sample"])}
    assert not turned["sample"].flags.c_contiguous
    expected = session.infer(feeds)["model_output"]
    np.testing.assert_array_equal(session.infer(turned)["model_output"], expected)


def test_the_session_serves_several_shapes_in_turn() -> None:
    session, network = _open(shared_openvino()), small.small_network()
    for shape in ((1, 16, 16), (3, 8, 40), (1, 16, 16)):
        feeds = small.feeds_at(*shape)
        found = session.infer(feeds)["model_output"]
        np.testing.assert_allclose(found, small.reference(network, feeds), atol=2e-6)


# -- precision ----------------------------------------------------------------------------------


def test_the_precision_is_pinned_and_read_back_from_the_layers() -> None:
    session = _open(shared_openvino())
    used = session.precision_used()
    assert (used["device"], used["precision_hint"], used["threads"]) == ("CPU", "f32", 1)
    assert set(used["kernels_by_type"]) == {"f32"}
    assert set(used["kernels"]["Convolution"]) == {"f32"}
    (line,) = check_precision(_subject(session))
    assert line.status == "passed"


def test_what_openvino_would_do_by_itself_is_noticed() -> None:
    """Left alone, a CPU with bfloat16 units computes an fp32 model in bfloat16."""
    _needs_bfloat16()
    options = {**compile_options("CPU", "fp32", 1), "INFERENCE_PRECISION_HINT": "bf16"}
    session = OpenedOpenvino(shared_openvino().path, "CPU", options)
    (line,) = check_precision(_subject(session))
    assert line.status == "failed" and "bf16" in line.message


def _needs_bfloat16() -> None:
    core = openvino.import_openvino().Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16 units")


def test_an_engine_made_for_bfloat16_computes_in_it_but_for_its_angles() -> None:
    """Rounded to bfloat16, timestep 999 is 1000: a radian off."""
    _needs_bfloat16()
    session, feeds = _open(shared_openvino("bf16")), small.feeds_at()
    used = session.precision_used()
    assert used["precision_hint"] == "bf16" and set(used["kernels"]["Convolution"]) == {"bf16"}
    (line,) = check_precision(_subject(session, "bf16"))
    assert line.status == "passed"
    feeds["timestep"][:] = 999
    wanted = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(session.infer(feeds)["model_output"], wanted, atol=0.02)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_angles_stay_exact_whatever_else_is_rounded(precision: str) -> None:
    session, feeds = _open(shared_openvino(precision)), small.feeds_at()
    feeds["timestep"][:] = 999
    names = [name for name in session.value_names() if name.endswith(("Sin", "Cos"))]
    phase = 999 * small.small_network().frequencies.numpy()
    for name, values in session.probe(feeds, names).items():
        exact = np.sin(phase) if name.endswith("Sin") else np.cos(phase)
        np.testing.assert_allclose(values[0], exact, atol=1e-4, err_msg=name)
    assert len(names) == 2


def test_a_cpu_without_units_for_bfloat16_computes_in_float32(monkeypatch) -> None:
    class Plain:
        def get_property(self, *_: object) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino.import_openvino(), "Core", Plain)
    asked = ("bf16", "int8_bf16", "int8", "fp32")
    found = [OpenvinoSession().computes_in(one, "cpu") for one in asked]
    assert found == ["fp32", "fp32", "int8", "fp32"]


def test_fp16_weights_are_named_and_computed_with_in_float32() -> None:
    artifact = shared_openvino("fp16")
    used = _open(artifact).precision_used()
    assert used["precision_hint"] == "f32" and "bf16" not in used["kernels_by_type"]


def test_a_gpu_may_compute_an_fp16_model_in_fp16_and_no_other() -> None:
    assert compile_options("GPU", "fp16", 2) == {"INFERENCE_PRECISION_HINT": "f16"}
    assert compile_options("GPU", "fp32", 2) == {"INFERENCE_PRECISION_HINT": "f32"}
    assert compile_options("CPU", "fp16", 2)["INFERENCE_PRECISION_HINT"] == "f32"
    assert compile_options("CPU", "int8", 2)["INFERENCE_PRECISION_HINT"] == "f32"
    assert compile_options("CPU", "int8_bf16", 2)["INFERENCE_PRECISION_HINT"] == "bf16"


# -- kept blobs ---------------------------------------------------------------------------------


def test_the_second_opening_takes_the_kept_blob_and_computes_the_same(cache: Path) -> None:
    first, feeds = _open(shared_openvino()), small.feeds_at()
    second = _open(shared_openvino())
    assert (first.from_cache, second.from_cache) == (False, True)
    for feeds in (small.feeds_at(), small.feeds_at(2, 24, 8)):
        expected = first.infer(feeds)["model_output"]
        np.testing.assert_array_equal(second.infer(feeds)["model_output"], expected)
    assert second.precision_used() == first.precision_used()
    (blob,) = cache.iterdir()
    assert blob.suffix == ".blob"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_blob_is_made_again(cache: Path, damage: str) -> None:
    feeds = small.feeds_at()
    expected = _open(shared_openvino()).infer(feeds)["model_output"]
    (blob,) = cache.iterdir()
    whole = blob.read_bytes()
    middle = len(whole) // 2
    blob.write_bytes(
        {
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    session = _open(shared_openvino())
    assert not session.from_cache
    np.testing.assert_array_equal(session.infer(feeds)["model_output"], expected)
    assert _open(shared_openvino()).from_cache


def test_a_blob_that_openvino_refuses_is_made_again(cache: Path) -> None:
    """Sealed, but not what this OpenVINO reads."""
    import hashlib

    _open(shared_openvino())
    (blob,) = cache.iterdir()
    foreign = b"a blob of another build of the same version"
    blob.write_bytes(hashlib.sha256(foreign).digest() + foreign)
    assert not _open(shared_openvino()).from_cache
    assert _open(shared_openvino()).from_cache


def test_another_model_at_the_same_place_has_its_own_blob(tmp_path: Path) -> None:
    place = small.copied(shared_openvino(), tmp_path / "place")
    feeds = small.feeds_at()
    before = _open(place).infer(feeds)["model_output"]
    other = with_weight(place, tmp_path / "other", "conv_in.weight", 9)
    shutil.rmtree(place.path)
    session = _open(Artifact(place.type, other.path.rename(place.path), ""))
    assert not session.from_cache
    assert np.abs(session.infer(feeds)["model_output"] - before).max() > 1e-3


def test_without_a_place_for_blobs_it_opens_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "file"))
    session = _open(shared_openvino())
    assert not session.from_cache
    assert np.isfinite(session.infer(small.feeds_at())["model_output"]).all()


def test_nothing_is_written_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small.copied(shared_openvino(), tmp_path / "bundle")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    session = _open(model)
    session.infer(small.feeds_at())
    session.probe(small.feeds_at())
    session.precision_used()
    session.close()
    assert openvino.digest(model.path) == model.digest
    assert not list(elsewhere.iterdir())


# -- probe --------------------------------------------------------------------------------------


def test_probe_gives_inner_values_in_execution_order() -> None:
    import torch

    session, feeds = _open(shared_openvino()), small.feeds_at()
    found = session.probe(feeds)
    assert list(found) == session.value_names()
    expected = small.small_network().conv_in(torch.from_numpy(feeds["sample"])).numpy()
    np.testing.assert_allclose(found["/conv_in/Conv"], expected, atol=1e-6)
    last = list(found)[-1]
    np.testing.assert_allclose(found[last], session.infer(feeds)["model_output"], atol=1e-6)
    assert list(session.probe(feeds, [last, "/conv_in/Conv"])) == ["/conv_in/Conv", last]


def test_the_first_bad_node_is_named(tmp_path: Path) -> None:
    sick = with_weight(shared_openvino(), tmp_path, "block.conv.weight", np.nan)
    session, feeds = _open(sick), small.feeds_at()
    assert not np.isfinite(session.infer(feeds)["model_output"]).all()
    blame = find_bad_node(_subject(session), "not_finite", feeds, None)
    assert blame.values["first_bad_node"] == "/block/conv/Conv/WithoutBiases", blame.words


# -- refusals -----------------------------------------------------------------------------------


def test_another_kind_of_artifact_is_refused() -> None:
    artifact = Artifact(ArtifactType("onnx"), shared_openvino().path, "")
    with pytest.raises(ArtifactError, match="an openvino artifact"):
        _open(artifact)


def test_another_runtime_refuses_the_model() -> None:
    with pytest.raises(ArtifactError, match="openvino"):
        open_session(OnnxSession(), shared_openvino(), small.CONTRACT)


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    model = small.copied(shared_openvino(), tmp_path)
    file = openvino.model_file(model.path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"model\.xml(.|\n)*truncated"):
        _open(model)


def test_weights_of_another_component_are_refused(tmp_path: Path) -> None:
    model = small.copied(shared_openvino(), tmp_path)
    shutil.copy(openvino.weights_file(shared_openvino("fp16").path),
                openvino.weights_file(model.path))  # fmt: skip
    with pytest.raises(ArtifactError, match=r"model\.bin"):
        _open(model)


@pytest.mark.parametrize("feeds", [
    {"sample": small.feeds_at()["sample"][:, :3]},
    {"sample": small.feeds_at(height=72)["sample"]},
    {"timestep": small.feeds_at()["timestep"].astype("float64")},
    {"context": small.feeds_at()["context"].astype("int32")},
    {"stranger": small.feeds_at()["context"]},
], ids=["channels", "beyond the bounds", "float64", "int32", "unknown name"])  # fmt: skip
def test_feeds_that_do_not_fit_are_refused_by_the_model_itself(feeds: dict[str, np.ndarray]) -> None:  # fmt: skip # noqa: E501
    session = _open(shared_openvino())
    with pytest.raises(ContractError, match="sample: float32"):
        session.infer({**small.feeds_at(), **feeds})


def test_a_missing_feed_is_refused() -> None:
    feeds = small.feeds_at()
    del feeds["context"]
    with pytest.raises(ContractError, match="context: float32"):
        _open(shared_openvino()).infer(feeds)


def test_a_fixed_engine_refuses_another_shape() -> None:
    artifact = shared_openvino("fp32", ONE_SHAPE)
    with pytest.raises(ContractError, match="fixed shapes"):
        open_session(OpenvinoSession(), artifact, small.CONTRACT).infer(small.feeds_at(2))
    with pytest.raises(ContractError, match="sample"):
        _open(artifact).infer(small.feeds_at(2))


def test_without_openvino_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name)
    )
    for device in ("cpu", "gpu"):
        problem = OpenvinoSession().unavailable(device)
        assert isinstance(problem, MissingToolError) and "diffoundry[openvino]" in problem.remedy
    with pytest.raises(MissingToolError):
        _open(shared_openvino())


@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_an_absent_device_is_deferred(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Host:
        available_devices = ("CPU",)

    package = openvino.import_openvino()
    monkeypatch.setattr(package, "Core", Host)
    problem = OpenvinoSession().unavailable(device)
    assert isinstance(problem, DeferredError) and "CPU" in problem.found


def test_an_unknown_device_is_a_mistake() -> None:
    assert isinstance(OpenvinoSession().unavailable("tpu"), UsageError)
