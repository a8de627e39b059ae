"""Finds stages and runtimes by listing their folders, so that a new target edits no list.

A stage's or runtime's name is its module's name; its class is the one dataclass or class in
that module whose snake_case name equals the module's.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from diffoundry.errors import DiffoundryError
from diffoundry.types import Runtime

STAGE_PACKAGES = ("diffoundry.compilers", "diffoundry.exporters", "diffoundry.stages")
RUNTIME_PACKAGE = "diffoundry.runtimes"


def _modules(package: str) -> dict[str, str]:
    found = importlib.import_module(package)
    return {info.name: f"{package}.{info.name}" for info in pkgutil.iter_modules(found.__path__)}


def _class_of(module_name: str) -> type[Any] | None:
    """The class whose name is the module's name in CamelCase, whatever its capitals."""
    module = importlib.import_module(module_name)
    wanted = module_name.rpartition(".")[2].replace("_", "").lower()
    for name, value in vars(module).items():
        ours = isinstance(value, type) and value.__module__ == module_name
        if ours and name.lower() == wanted:
            return value
    return None


def stage_modules() -> dict[str, str]:
    """Every candidate stage: name -> module path (nothing is imported yet)."""
    return {
        name: path for package in STAGE_PACKAGES for name, path in sorted(_modules(package).items())
    }


def discover_stages() -> dict[str, type[Any]]:
    """Every stage class by name."""
    found = {name: _class_of(path) for name, path in stage_modules().items()}
    return {name: cls for name, cls in found.items() if cls is not None and hasattr(cls, "run")}


def stage_class(name: str) -> type[Any]:
    """The stage called `name`; imports only its module. Raises DiffoundryError."""
    modules = stage_modules()
    cls = _class_of(modules[name]) if name in modules else None
    if cls is None or not hasattr(cls, "run"):
        raise DiffoundryError(
            f"stage {name!r}",
            expected=f"one of {', '.join(sorted(discover_stages()))}",
            found=name,
            remedy="correct the stage's name in the profile",
        )
    return cls


def retraces(name: str) -> bool:
    """Whether the stage's converter traces the module by itself, beside the shared export."""
    return bool(getattr(stage_class(name), "retraces", False))


def discover_runtimes() -> dict[str, Runtime]:
    """Every runtime by name, as an instance."""
    found = {name: _class_of(path) for name, path in _modules(RUNTIME_PACKAGE).items()}
    return {name: cls() for name, cls in found.items() if cls is not None and hasattr(cls, "open")}


def runtime_named(name: str) -> Runtime:
    """The runtime called `name`. Raises DiffoundryError."""
    runtimes = discover_runtimes()
    if name not in runtimes:
        raise DiffoundryError(
            f"runtime {name!r}",
            expected=f"one of {', '.join(sorted(runtimes))}",
            found=name,
            remedy="correct the runtime's name",
        )
    return runtimes[name]
