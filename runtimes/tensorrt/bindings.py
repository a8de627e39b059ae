"""Finds TensorRT's Python bindings, and collects what it logs."""

from __future__ import annotations

import importlib
from typing import Any

from diffoundry.errors import DeferredError
from diffoundry.formats.tensorrt_build import BELOW, OLDEST

# NVIDIA's own package brings the libraries; the bindings alone find those of the system.
_MODULES = ("tensorrt", "tensorrt_bindings")
_KEPT = 20


def load(at_least: str = OLDEST, below: str = BELOW) -> Any:
    """TensorRT's module. Raises DeferredError where it is absent, broken, or of another version.

    The libraries come with the target host's TensorRT: without them this is deferred, whether
    or not the bindings are installed.
    """
    problems = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            problems.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        version = str(module.__version__)
        if _number(at_least) <= _number(version) < _number(below):
            return module
        problems.append(f"{name} {version}")
    raise DeferredError(
        "tensorrt_engine",
        expected=f"TensorRT ≥ {at_least}, < {below}, with its libraries",
        found="; ".join(problems),
        remedy="complete this on a host that has it: diffoundry verify BUNDLE --complete",
    )


def new_log(trt: Any) -> Any:
    """A logger that keeps the newest warnings and errors in `.errors` and `.warnings`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors = [*self.errors, msg][-_KEPT:]
            elif severity == trt.ILogger.WARNING:
                self.warnings = [*self.warnings, msg][-_KEPT:]

    return Log()


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "10.13.0.35" -> (10, 13, 0, 35)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
