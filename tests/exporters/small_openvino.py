"""OpenVINO models of the small network, each converted once in a process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diffoundry.exporters.openvino_from_onnx import OpenvinoFromOnnx
from diffoundry.formats import openvino
from diffoundry.types import Artifact, ArtifactType, Contract, ShapePolicy, StageContext
from tests.compilers import small_network as small

ONE_SHAPE = ShapePolicy("fixed", ((("batch", 1), ("height", 16), ("width", 16)),))


def convert(
    folder: Path, source: Artifact, contract: Contract = small.CONTRACT, **options: Any
) -> Artifact:
    """Run the stage in `folder` / openvino."""
    stage, work = OpenvinoFromOnnx(**options), folder / "openvino"
    work.mkdir(parents=True)
    produced = stage.run({"model": source}, StageContext(work, contract.component, contract))
    made = ArtifactType("openvino", stage.precision, stage.shape_policy)
    path = produced["model"].path
    return Artifact(made, path, openvino.digest(path), contract.component)


@functools.cache
def shared_openvino(precision: str = "fp32", policy: ShapePolicy | None = None) -> Artifact:
    """One model for all tests of a process. Tests that damage it copy it first."""
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return convert(
        folder,
        small.shared_onnx(),
        precision=precision,
        shape_policy=policy or ShapePolicy(),
    )


def with_weight(artifact: Artifact, folder: Path, layer: str, value: float) -> Artifact:
    """A copy whose constant `layer` begins with `value`: another model, sealed as such."""
    made = small.copied(artifact, folder)
    graph = openvino.read_graph(made.path)
    data = graph.find(f"layers/layer[@name='{layer}']/data")
    assert data is not None, layer
    start, file = int(data.get("offset", "")), openvino.weights_file(made.path)
    weights = bytearray(file.read_bytes())
    weights[start : start + 4] = np.float32(value).tobytes()
    file.write_bytes(weights)
    openvino.canonicalise(made.path)
    return made
