"""The key of a stage's outputs: everything that can change them, hashed."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffoundry
from diffoundry.formats.canonical import canonical_json, sha256_bytes, sha256_file

CORE = Path(diffoundry.__file__).parent


def module_file(module: str) -> Path | None:
    """The source file of a `diffoundry` module, found without importing it."""
    parts = module.split(".")[1:]
    base = CORE
    if parts and not (CORE / parts[0]).exists() and not (CORE / f"{parts[0]}.py").exists():
        base = _sibling_package(parts[0]) or CORE
        parts = parts[1:]
    path = base.joinpath(*parts)
    if path.is_dir():
        path = path / "__init__.py"
    else:
        path = path.with_suffix(".py") if path.suffix != ".py" else path
    return path if path.is_file() else None


@functools.cache
def _sibling_package(name: str) -> Path | None:
    """exporters, compilers, … lie beside core/ in an editable install, inside it in a wheel."""
    import importlib.util

    spec = importlib.util.find_spec(f"diffoundry.{name}")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@functools.cache
def imported_modules(module: str) -> tuple[str, ...]:
    """The Diffoundry modules that `module` names in import statements, at any depth of nesting."""
    path = module_file(module)
    if path is None:
        return ()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                prefix = package.rsplit(".", node.level - 1)[0]
                base = f"{prefix}.{base}" if base else prefix
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    ours = {n for n in names if n.split(".")[0] == "diffoundry" and module_file(n) is not None}
    return tuple(sorted(ours - {module, "diffoundry"}))


@functools.cache
def source_hash(module: str) -> str:
    """Digest of a module's source and of every Diffoundry module it imports, transitively."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imported_modules(name)
    files = {name: module_file(name) for name in seen}
    return sha256_bytes(
        canonical_json({name: sha256_file(path) for name, path in files.items() if path})
    )


@functools.cache
def tool_version(distribution: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def stage_key(
    *,
    stage: str,
    module: str,
    options: Mapping[str, Any],
    outputs: Any = None,
    inputs: Mapping[str, str],
    contracts: Any,
    tools: tuple[str, ...],
    plugins: tuple[str, ...] = (),
    bound_to: str | None = None,
) -> str:
    """Return "sha256:<hex>" over the stage, its source, options, input digests, axes and tools.

    `contracts` carries the axes; `plugins` are modules that the stage finds by name; `bound_to`
    names the device or instruction set where the output only runs there.
    """
    return sha256_bytes(
        canonical_json(
            {
                "stage": stage,
                "source": {name: source_hash(name) for name in (module, *plugins)},
                "options": options,
                "outputs": outputs,
                "inputs": dict(inputs),
                "contracts": contracts,
                "tools": {name: tool_version(name) for name in tools},
                "bound_to": bound_to,
            }
        )
    )
