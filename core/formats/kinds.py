"""From the name of a kind to the module of its format."""

from __future__ import annotations

import importlib
from types import ModuleType

from diffoundry.types import Artifact


def integer_layers_of(artifact: Artifact) -> dict[str, str] | None:
    """Qualified name -> scheme of every layer that is INT8 in the artifact's file; None where its
    format cannot tell. Raises ArtifactError for a damaged file."""
    read = getattr(format_of(artifact.type.kind), "integer_layers", None)
    return None if read is None else dict(read(artifact.path))


def format_of(kind: str) -> ModuleType | None:
    """The module `core/formats/<kind>.py`, if that kind has one."""
    name = f"diffoundry.formats.{kind}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
