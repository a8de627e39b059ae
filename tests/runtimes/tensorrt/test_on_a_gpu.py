"""A real engine, on a host that has a GPU and TensorRT's libraries; skipped everywhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffoundry.compilers.tensorrt_from_onnx import TensorrtFromOnnx
from diffoundry.errors import ContractError
from diffoundry.formats import tensorrt_build
from diffoundry.runtimes.tensorrt_engine import TensorrtEngine
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType, StageContext
from tests.compilers import small_network as small

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_computes_what_pytorch_computes(
    precision: str, cuda_graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = TensorrtEngine().unavailable("cuda")
    if problem is not None:
        pytest.skip(str(problem))
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
    context = StageContext(tmp_path, "unet", small.CONTRACT, threads=1)
    stage = TensorrtFromOnnx(precision=precision, cuda_graph=cuda_graph)  # type: ignore[arg-type]
    path = stage.run({"model": small.shared_onnx(precision)}, context)["build"].path
    kind = ArtifactType("tensorrt_build", precision)  # type: ignore[arg-type]
    artifact = Artifact(kind, path, tensorrt_build.digest(path), "unet")
    session = open_session(TensorrtEngine(), artifact, small.CONTRACT, "cuda")
    for shape in ((1, 16, 16), (1, 16, 16), (1, 16, 16), (4, 64, 24), (1, 8, 8)):
        feeds = small.feeds_at(*shape)
        expected = small.reference(small.small_network(), feeds)
        found = session.infer(feeds)["model_output"]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE[precision])
    with pytest.raises(ContractError):
        session.infer(small.feeds_at(5))
    used = session.precision_used()
    assert used["tf32"] == "off" and used["compute"]
    assert precision == "fp16" or used["compute"] == ["float32"]
    session.close()
