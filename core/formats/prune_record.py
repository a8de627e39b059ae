"""The prune_record kind: prune.json, what was cut from a component, why, and what it saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical

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
    path = canonical.inside(folder, FILE)
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(document, dict) or document.keys() != FIELDS or document["schema"] != SCHEMA:
        raise _damaged(path, "other fields, or another version")
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


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"prune record {path}", expected=SCHEMA, found=found, remedy="run the build again"
    )
