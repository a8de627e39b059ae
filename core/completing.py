"""What `verify --complete` adds where engines are built on the host: the engines themselves.

A bundle of such a target carries a build specification. The host that has the device builds the
engine and checks it; it is kept below evidence/, so that the manifest stays what it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from diffoundry.artifacts import disk
from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import BUILT_ENGINES, BuiltEngine, host_name
from diffoundry.artifacts.manifest import EVIDENCE, VariantRecord
from diffoundry.discovery import runtime_named
from diffoundry.errors import DiffoundryError
from diffoundry.formats.canonical import inside, tree_digest, tree_size_bytes
from diffoundry.types import Artifact


@runtime_checkable
class BuildsEngines(Protocol):
    """What a runtime may add, where it builds the engine itself from an artifact."""

    def built_engine(self, artifact: Artifact, device: str) -> Path | None:
        """The folder of the engine that this host built from `artifact`; None for none."""
        ...

    def built_on(self, folder: Path) -> dict[str, Any]:
        """The fingerprint of such a folder: what decides where else it may run."""
        ...


def keep_engines(
    bundle: Bundle, variant: VariantRecord, components: Sequence[str]
) -> dict[str, BuiltEngine]:
    """Copy the engines that this host built of `components` into the bundle's evidence/.

    An engine of an earlier run is replaced. Nothing where the runtime builds none. Raises
    UsageError where the bundle cannot be written to.
    """
    try:
        runtime = runtime_named(variant.runtime)
    except DiffoundryError:  # the bundle of a newer version
        return {}
    if not isinstance(runtime, BuildsEngines):
        return {}
    kept = {}
    for component in components:
        built = runtime.built_engine(bundle.engine(variant, component), variant.device)
        if built is not None:
            relative = f"{EVIDENCE}/{BUILT_ENGINES}/{host_name()}/{variant.name}/{component}"
            with disk.explained(f"evidence of the bundle {bundle.path}", bundle.path):
                target = _replace(inside(bundle.path, relative), built)
            kept[component] = BuiltEngine(
                path=relative,
                digest=tree_digest(target),
                size_bytes=tree_size_bytes(target),
                built_on=runtime.built_on(target),
            )
    return kept


def _replace(target: Path, source: Path) -> Path:
    """Put a copy of the folder `source` at `target`, whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        for file in sorted(source.iterdir()):
            disk.copy(file, partial / file.name)
        disk.remove(target)
        partial.rename(target)
    finally:
        disk.remove(partial)
    return target
