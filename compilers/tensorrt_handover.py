"""What lies beside a TensorRT build for people: how to compare engine and ONNX by hand."""

from __future__ import annotations

from diffoundry.formats.tensorrt_build import INPUTS_FILE, ONNX_FOLDER, BuildSpec, Profile

_MODEL = f"{ONNX_FOLDER}/model.onnx"
# Mean over the values: single values of two fp16 engines differ more. `verify` holds the limits.
_TOLERANCE = {"fp32": "1e-4", "fp16": "1e-2", "int8": "5e-2"}


def readme_text(component: str, spec: BuildSpec) -> str:
    """README.md of one build: what it is, how to complete it, Polygraphy's command."""
    return f"""\
# {component}: a TensorRT build, and no engine yet

An engine runs only on the kind of GPU that it was built on, so none is included. Here are the
graph that TensorRT is given (`{_MODEL}`) and how it is built (`build.json`): strongly typed,
{spec.precision}, TensorRT ≥ {spec.tensorrt_at_least}, < {spec.tensorrt_below}. The graph was
checked with onnxruntime before the bundle was published; the engine is **deferred**.

On a host with TensorRT and a GPU, from the root of the bundle:

```sh
diffoundry verify . --complete    # builds every engine, checks it, writes both into evidence/
```

To compare engine and graph yourself, with NVIDIA's Polygraphy, in this folder, on the recorded
inputs of the PyTorch original (`golden/`):

```sh
{polygraphy_command(spec)}
```

`polygraphy inspect model {_MODEL}` shows the graph.
"""


def polygraphy_command(spec: BuildSpec) -> str:
    """The shell command that builds the engine and compares it with onnxruntime."""
    lines = [f"polygraphy run {_MODEL} --trt --onnxrt --strongly-typed"]
    for profile in spec.profiles:
        lines += [_shapes(profile, which) for which in ("min", "opt", "max")]
    flags = {
        "--weight-streaming": spec.weight_streaming,
        "--refittable": spec.refit,
        "--version-compatible": spec.version_compatible,
        f"--pool-limit workspace:{spec.workspace_bytes}": spec.workspace_bytes is not None,
        f"--builder-optimization-level {spec.optimization_level}": (
            spec.optimization_level is not None
        ),
    }
    lines += [flag for flag, wanted in flags.items() if wanted]
    tolerance = _TOLERANCE[spec.precision]
    lines += [f"--data-loader-script {INPUTS_FILE}"]
    lines += [f"--check-error-stat mean --atol {tolerance} --rtol {tolerance}"]
    return " \\\n    ".join(lines)


def _shapes(profile: Profile, which: str) -> str:
    shapes = " ".join(
        f"'{name}:[{','.join(str(size) for size in getattr(shapes, which))}]'"
        for name, shapes in profile.items()
    )
    return f"--trt-{which}-shapes {shapes}"


INPUTS_SCRIPT = '''\
"""Feeds for Polygraphy: the recorded inputs of this component (needs numpy only).

Read from golden/COMPONENT of the bundle, or from the folder that $GOLDEN names.
"""

import json
import os
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "|b1"}


def load_data():
    named = os.environ.get("GOLDEN")
    golden = Path(named) if named else HERE.parents[2] / "golden" / HERE.name
    recording = json.loads((golden / "recording.json").read_text(encoding="utf-8"))["recording"]
    data = (golden / "tensors.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for call in recording["calls"]:
        feeds = {}
        for name, reference in call["feeds"].items():
            entry = header[reference["tensor"]]
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
            feeds[name] = flat.reshape(entry["shape"])
        yield feeds
'''
