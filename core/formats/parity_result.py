"""The `parity_result` kind: one JSON file with every check of one engine or variant."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical
from diffoundry.types import ParityResult

SCHEMA = "diffoundry.parity_result/1.0"
FILE = "parity.json"
"""The usual file name."""


def save(result: ParityResult, path: Path) -> None:
    """Write `result` to `path`; equal results give equal bytes.

    Raises ArtifactError for figures that JSON cannot hold (NaN, infinity).
    """
    sick = _not_finite(dataclasses.asdict(result), result.subject)
    if sick:
        raise ArtifactError(
            f"parity result of {result.subject}",
            expected="finite figures",
            found=", ".join(sick),
            remedy="this is a fault of Diffoundry: report it",
        )
    text = canonical.pretty_json({"schema": SCHEMA, "result": result})
    canonical.atomic_write(path, text)


def load(path: Path) -> ParityResult:
    """Read a parity result. Raises ArtifactError where it is damaged or of another schema."""
    from pydantic import ValidationError

    try:
        document = json.loads(path.read_bytes())
        schema = str(document["schema"])
        if schema.rpartition(".")[0] != SCHEMA.rpartition(".")[0]:
            raise _damaged(path, schema)
        return canonical.parse(ParityResult, document["result"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def validate(path: Path) -> None:
    """Check that the file is a whole parity result. Raises ArtifactError."""
    load(path)


def digest(path: Path) -> str:
    """Digest of the file's bytes (they are written canonically)."""
    return canonical.sha256_file(path)


def size_bytes(path: Path) -> int:
    """Bytes of the file."""
    return canonical.tree_size_bytes(path)


def _not_finite(value: Any, name: str) -> list[str]:
    """The places that hold NaN or infinity (pydantic would write them as null, unasked)."""
    if isinstance(value, Mapping):
        return [n for key, item in value.items() for n in _not_finite(item, f"{name}.{key}")]
    if isinstance(value, list | tuple):
        return [n for i, item in enumerate(value) for n in _not_finite(item, f"{name}.{i}")]
    return [name] if isinstance(value, float) and not math.isfinite(value) else []


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"parity result {path}",
        expected=f"a JSON file that follows {SCHEMA}",
        found=found,
        remedy="run the check again",
    )
