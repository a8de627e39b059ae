"""LiteRT behind the Session interface: signatures, dtypes, probe, precision, damage."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    MissingToolError,
    UsageError,
)
from diffoundry.formats import tflite
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.runtimes.tflite_interpreter import OpenedTflite, TfliteInterpreter
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType
from tests.exporters import tiny_tflite as tiny


def opened(artifact: Artifact | None = None, threads: int = 1) -> OpenedTflite:
    return TfliteInterpreter().open(artifact or tiny.shared_tflite(), tiny.CONTRACT, "cpu", threads)


def test_signatures_may_be_called_in_any_order_and_again() -> None:
    session = opened()
    calls = [(shape, seed) for seed in (0, 1) for shape in (tiny.OTHER, tiny.USUAL, tiny.OTHER)]
    first: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for shape, seed in calls * 2:
        feeds = tiny.feeds_at(shape, seed)
        found = session.infer(tiny.on_device(feeds))
        for name, value in tiny.reference(feeds).items():
            np.testing.assert_allclose(found[name], value, atol=1e-5)
        key = (shape["height"], seed)
        for name, value in first.setdefault(key, found).items():
            np.testing.assert_array_equal(found[name], value)


def test_outputs_are_not_overwritten_by_the_next_call() -> None:
    session = opened()
    found = session.infer(tiny.on_device(tiny.feeds_at(tiny.USUAL)))
    kept = {name: value.copy() for name, value in found.items()}
    session.infer(tiny.on_device(tiny.feeds_at(tiny.USUAL, 1)))
    for name, value in kept.items():
        np.testing.assert_array_equal(found[name], value)


def test_threads_do_not_change_the_result() -> None:
    feeds = tiny.on_device(tiny.feeds_at(tiny.OTHER))
    one, two = opened(threads=1).infer(feeds), opened(threads=2).infer(feeds)
    np.testing.assert_allclose(one["model_output"], two["model_output"], atol=1e-6)


def test_a_shape_without_a_signature_is_refused_and_the_session_stays_whole() -> None:
    session = opened()
    feeds = tiny.on_device(tiny.feeds_at({"batch": 1, "height": 32, "width": 16}))
    with pytest.raises(ContractError, match="b1_h16_w16"):
        session.infer(feeds)
    feeds = tiny.feeds_at(tiny.USUAL)
    found = session.infer(tiny.on_device(feeds))
    np.testing.assert_allclose(found["words"], tiny.reference(feeds)["words"], atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("input_ids", "int64"), ("sample", "float64")])
def test_a_wrong_dtype_is_refused(name: str, dtype: str) -> None:
    feeds = tiny.on_device(tiny.feeds_at(tiny.USUAL))
    feeds[name] = feeds[name].astype(dtype)
    with pytest.raises(ContractError, match="input_ids: int64"):
        opened().infer(feeds)


def test_a_central_session_takes_the_components_int64_and_refuses_what_nobody_declared() -> None:
    session = open_session(TfliteInterpreter(), tiny.shared_tflite(), tiny.CONTRACT)
    feeds = tiny.feeds_at(tiny.OTHER)
    found = session.infer(feeds)
    np.testing.assert_allclose(found["words"], tiny.reference(feeds)["words"], atol=1e-5)
    with pytest.raises(ContractError, match="sample is float64"):
        session.infer({**feeds, "sample": feeds["sample"].astype(np.float64)})
    with pytest.raises(ContractError, match="enumerated shapes"):
        session.infer(tiny.feeds_at({"batch": 1, "height": 24, "width": 16}))
    with pytest.raises(ContractError, match="input 'input_ids'"):
        session.infer({**feeds, "input_ids": feeds["input_ids"] + 2**40})


def test_the_wrong_runtime_is_refused_both_ways() -> None:
    artifact = tiny.shared_tflite()
    with pytest.raises(ArtifactError, match="cannot open"):
        open_session(OnnxSession(), artifact, tiny.CONTRACT)
    foreign = dataclasses.replace(artifact, type=ArtifactType("onnx"))
    with pytest.raises(ArtifactError, match="a tflite artifact"):
        TfliteInterpreter().open(foreign, tiny.CONTRACT, "cpu")


def test_a_truncated_model_is_refused_and_never_opened(tmp_path: Path) -> None:
    artifact = tiny.copied(tmp_path)
    file = tflite.model_file(artifact.path)
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(ArtifactError, match=r"model\.tflite"):
        opened(artifact)


def test_probe_gives_inner_values_in_execution_order() -> None:
    session, feeds = opened(), tiny.feeds_at(tiny.OTHER)
    found = session.probe(tiny.on_device(feeds))
    assert list(found) == session.value_names(tiny.on_device(feeds))
    network = tiny.tiny_network()
    expected = network.conv_in(torch.from_numpy(feeds["sample"])).numpy().transpose(0, 2, 3, 1)
    wanted = next(
        n for n, v in found.items() if n.startswith("conv_in") and v.shape == expected.shape
    )
    np.testing.assert_allclose(found[wanted], expected, atol=1e-5)
    assert list(session.probe(tiny.on_device(feeds), [wanted])) == [wanted]
    last = next(value for name, value in reversed(found.items()) if "model_output" in name)
    np.testing.assert_allclose(last, tiny.reference(feeds)["model_output"], atol=1e-5)


def test_probe_refuses_an_unknown_name() -> None:
    feeds = tiny.on_device(tiny.feeds_at(tiny.USUAL))
    with pytest.raises(ContractError, match="conv_inn"):
        opened().probe(feeds, ["conv_inn"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_computed_in_is_read_back(precision: str) -> None:
    used = opened(tiny.shared_tflite(precision), threads=2).precision_used()
    assert used["compute"] == "float32" and used["fp16_allowed"] is False
    assert used["delegate"] == "XNNPACK" and used["partitions"] >= 1
    assert used["threads"] == 2
    assert ("float16" in used["weights"]) == (precision == "fp16")


def test_a_file_that_lets_xnnpack_compute_in_fp16_does_not_pass_for_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tflite, "metadata_names", lambda path: (tflite.REDUCED_PRECISION,))
    assert opened().precision_used()["compute"] == "float16"


def test_opening_a_model_says_nothing_on_the_terminal() -> None:
    """LiteRT's own notice is written past Python, once for each process."""
    code = (
        "import sys, pathlib\n"
        "from diffoundry.runtimes.tflite_interpreter import TfliteInterpreter\n"
        "from diffoundry.types import Artifact, ArtifactType, Contract\n"
        "artifact = Artifact(ArtifactType('tflite'), pathlib.Path(sys.argv[1]), '')\n"
        "session = TfliteInterpreter().open(artifact, Contract('unet', (), (), ()), 'cpu', 1)\n"
        "print('errors still show', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny.shared_tflite().path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "" and done.stderr == "errors still show\n"


def test_without_ai_edge_litert_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ai_edge_litert" else real(name)
    )
    problem = TfliteInterpreter().unavailable("cpu")
    assert isinstance(problem, MissingToolError) and "diffoundry[tflite]" in problem.remedy


def test_a_delegate_that_is_not_here_is_deferred_and_an_unknown_one_is_a_mistake() -> None:
    problem = TfliteInterpreter().unavailable("qnn")
    assert isinstance(problem, DeferredError) and "libQnnTFLiteDelegate" in problem.expected
    assert isinstance(TfliteInterpreter().unavailable("tpu9"), UsageError)
    with pytest.raises(DeferredError):
        open_session(TfliteInterpreter(), tiny.shared_tflite(), tiny.CONTRACT, "qnn")
