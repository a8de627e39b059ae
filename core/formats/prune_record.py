"""The prune_record kind: prune.json, what was cut from a component, why, and what it saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffoundry.formats import canonical
from diffoundry.formats.documents import reading

KIND = "prune_record"
FILE = "prune.json"
SCHEMA = "diffoundry.prune_record/1.0"
FIELDS = frozenset({"schema", "settings", "sites", "parameters", "multiply_adds", "recovery"})


def save(folder: Path, document: Mapping[str, Any]) -> None:
    """Write the record into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(canonical.canonical_json({"schema": SCHEMA, **document}))


def load(folder: Path) -> dict[str, Any]:
    """The record. Raises ArtifactError where it is damaged or of another kind."""
    with reading("prune record", canonical.inside(folder, FILE), SCHEMA) as document:
        if document.keys() != FIELDS:
            raise ValueError(f"other fields: {', '.join(sorted(document.keys() ^ FIELDS))}")
        return document


def validate(folder: Path) -> None:
    """Raises ArtifactError where the record is damaged."""
    load(folder)


def digest(folder: Path) -> str:
    """Digest of the record (it is written canonically)."""
    return canonical.tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Bytes of the record."""
    return canonical.tree_size_bytes(folder)
