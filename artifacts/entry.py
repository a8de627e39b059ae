"""One finished stage of the store: what it made, how, and the record that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.formats.canonical import canonical_json, parse, plain, pretty_json, sha256_bytes
from diffoundry.types import ArtifactType, Contract

FORMAT = 1


@dataclass(frozen=True)
class StoredOutput:
    """One output of a stage. `path` is inside the entry, `digest` is "sha256:<hex>"."""

    path: Path
    type: ArtifactType
    digest: str
    size_bytes: int
    contract: Contract | None = None


@dataclass(frozen=True)
class NewOutput:
    """One output that is about to be published: `path` is moved into the entry."""

    path: Path
    type: ArtifactType
    contract: Contract | None = None


@dataclass(frozen=True)
class Record:
    """How an entry was made: for reports and evidence, never part of a key."""

    stage: str
    component: str | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A finished stage in the store."""

    key: str
    outputs: Mapping[str, StoredOutput]
    record: Record

    @property
    def stage(self) -> str:
        return self.record.stage

    @property
    def component(self) -> str | None:
        return self.record.component

    @property
    def seconds(self) -> float:
        return self.record.seconds

    @property
    def peak_memory_bytes(self) -> int:
        return self.record.peak_memory_bytes

    @property
    def tools(self) -> Mapping[str, str]:
        return self.record.tools


@dataclass(frozen=True)
class SavedOutput:
    """A StoredOutput as entry.json holds it: the path is the output's name."""

    type: ArtifactType
    digest: str
    size_bytes: int
    contract: Contract | None = None


@dataclass(frozen=True)
class SavedEntry:
    """What entry.json holds, beside its own digest."""

    format: int
    key: str
    outputs: Mapping[str, SavedOutput]
    record: Record


def write_record(path: Path, entry: SavedEntry) -> None:
    """Write entry.json, signed with a digest of its own."""
    data = plain(entry)
    signed = {"entry": data, "digest": sha256_bytes(canonical_json(data))}
    path.write_text(pretty_json(signed), encoding="utf-8")


def damaged(path: Path, expected: str, found: str) -> ArtifactError:
    """The error for a part of an entry that is not what was published."""
    return ArtifactError(str(path), expected=expected, found=found)


def read_record(path: Path) -> SavedEntry:
    """Read entry.json. Raises ArtifactError where it is damaged."""
    import json

    from pydantic import ValidationError

    try:
        signed = json.loads(path.read_text(encoding="utf-8"))
        entry, digest = signed["entry"], signed["digest"]
        if sha256_bytes(canonical_json(entry)) != digest:
            raise damaged(path, digest, "other contents")
        return parse(SavedEntry, entry)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise damaged(path, "the record of a stage", f"{type(error).__name__}: {error}") from error
