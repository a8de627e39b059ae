"""Lets NVIDIA's real Python bindings of TensorRT be imported where its libraries are not.

Three libraries of empty functions, compiled here, satisfy the loader. They can build and run
nothing: what is tested with them is which names, flags and signatures the bindings have.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

MAJORS = ("10", "11")
ROOT = Path(__file__).resolve().parent.parent
# tools/install.sh puts 10's bindings here: both majors are a package of the same name.
BINDINGS_10 = Path(sys.prefix) / "tensorrt10"
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_SOURCE = """
typedef void* p;
p createInferBuilder_INTERNAL(p a, int b) { return 0; }
p createInferRefitter_INTERNAL(p a, p b, int c) { return 0; }
p createInferRuntime_INTERNAL(p a, int b) { return 0; }
p createNvOnnxParser_INTERNAL(p a, p b, int c) { return 0; }
p createNvOnnxParserRefitter_INTERNAL(p a, p b, int c) { return 0; }
p getBuilderPluginRegistry(int a) { return 0; }
p getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(p a, const char* b) { return 1; }
"""


def run_with_bindings(major: str, script: str, data: Any = None) -> Any:
    """Run `script` in a new process that can import TensorRT `major`'s bindings.

    The script finds `data` as `data` and answers by calling `answer(value)`; both are JSON.
    Skips where there is no compiler, or the bindings are not installed.
    """
    prelude = (
        "import json, sys\ndata = json.load(sys.stdin)\n"
        "def answer(value): print('ANSWER' + json.dumps(value))\n"
    )
    path = os.pathsep.join([*([str(_bindings_10())] if major == "10" else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + script],
        input=json.dumps(data),
        env={**os.environ, "LD_LIBRARY_PATH": str(stub_libraries(major)), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    return json.loads(line.removeprefix("ANSWER"))


@functools.cache
def stub_libraries(major: str) -> Path:
    """The folder of the three stub libraries of one major version."""
    folder = Path(tempfile.mkdtemp(prefix=f"diffoundry-tensorrt{major}-"))
    for name in _LIBRARIES:
        file = f"lib{name}.so.{major}"
        compile_library(_SOURCE, folder / file, f"-Wl,-soname,{file}")
    return folder


def compile_library(source: str, target: Path, *flags: str) -> Path:
    """Compile C into a shared library; skips the test where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc on Linux, to compile libraries that stand in for NVIDIA's")
    text = target.with_suffix(".c")
    text.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, text, *flags], check=True)
    return target


def _bindings_10() -> Path:
    """Where 10's bindings are; in CI, whose set-up brings them, their absence is a failure."""
    if not (BINDINGS_10 / "tensorrt_bindings").is_dir():
        reason = f"TensorRT 10's bindings are not in {BINDINGS_10}: run tools/install.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return BINDINGS_10
