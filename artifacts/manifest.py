"""manifest.json of a bundle: what is in it, what it needs, and the digest of every file.

A manifest is deterministic and never changes: what was measured, where and when, stands in
evidence/. Same major schema version reads; a newer minor one warns; a newer major is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffoundry.errors import BundleError
from diffoundry.formats.canonical import pretty_json
from diffoundry.models.geometry import Geometry
from diffoundry.types import ArtifactType, Contract, Limits, Precision, ShapePolicy

SCHEMA = "diffoundry.bundle/1.1"
MANIFEST = "manifest.json"
EVIDENCE = "evidence"
Level = Literal["call", "drift", "trajectory", "image"]
Power = Literal["low", "balanced", "full"]
"""What a variant asks of its device: `generate --power` chooses by it."""

DIGEST = r"^sha256:[0-9a-f]{64}$"
# POSIX and Windows paths from the root, home folders, UNC names, file URLs.
ABSOLUTE = re.compile(r"(^|[\s'\"(=])(/[^\s/]+/|~/|[A-Za-z]:[\\/]|\\\\|file:)")


class Record(BaseModel):
    """The base of everything in a manifest: frozen; unknown fields of newer versions are let by."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class FileRecord(Record):
    """One file of the bundle."""

    digest: str = Field(pattern=DIGEST)
    size_bytes: int = Field(ge=0)


class ModelRecord(Record):
    """The pipeline that the bundle was built from."""

    name: str
    source_digest: str = Field(pattern=DIGEST)
    pipeline_class: str
    geometry: Geometry
    revision: str | None = None
    left_out: tuple[str, ...] = ()
    licence: str | None = None


class SamplingRecord(Record):
    """Schedulers that the step tables carry, and what `generate` uses when nothing is named."""

    schedulers: tuple[str, ...] = Field(min_length=1)
    scheduler: str
    steps: int = Field(ge=1)
    guidance: float = Field(ge=0)


class Requirement(Record):
    """A Python distribution that a variant needs at the receiving end."""

    distribution: str
    at_least: str


class EngineRecord(Record):
    """One component's engine in one variant. `path` is a file or folder of the bundle.

    `contract` is there only where the engine's edges differ from the component's contract.
    `lineage` lists the keys of the stages that made it, oldest first.
    """

    path: str
    type: ArtifactType
    digest: str = Field(pattern=DIGEST)
    size_bytes: int = Field(ge=0)
    contract: Contract | None = None
    lineage: tuple[str, ...] = ()


class CompressionRecord(Record):
    """How one component was made smaller on purpose: paths of the bundle.

    `plan` is the file of the quantization plan that the engine was made from; `prune` are those of
    the prune records, in the order in which they were applied; `simulation` is the folder of what
    the compressed component computes in PyTorch on the golden calls.
    """

    plan: str | None = None
    prune: tuple[str, ...] = ()
    simulation: str | None = None

    def paths(self) -> tuple[str, ...]:
        return (*self.prune, *filter(None, (self.plan, self.simulation)))


class VariantRecord(Record):
    """One complete way to run the pipeline. `compression` is component -> what was done to it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    runtime: str
    device: str
    precision: Precision
    shape_policy: ShapePolicy
    engines: dict[str, EngineRecord] = Field(min_length=1)
    limits: dict[Level, Limits]
    extra: str = ""
    requires: tuple[Requirement, ...] = ()
    notes: tuple[str, ...] = ()
    power: Power | None = None
    compression: dict[str, CompressionRecord] = {}

    @property
    def compressed(self) -> bool:
        """Whether something was given up, so that it has to show that it pays."""
        return self.precision != "fp32" or bool(self.compression)


class Manifest(Record):
    """The whole manifest. `golden` maps a component, or "pipeline", to its recording's folder."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    model: ModelRecord
    profile: str
    contracts: dict[str, Contract]
    variants: tuple[VariantRecord, ...] = Field(min_length=1)
    sampling: SamplingRecord
    golden: dict[str, str]
    step_tables: str
    tokenizer: str
    tools: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    files: dict[str, FileRecord] = {}

    def variant(self, name: str | None) -> VariantRecord:
        """The variant called `name`, or the first. Raises BundleError with those there are."""
        if name is None:
            return self.variants[0]
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise BundleError(
            f"variant {name!r}",
            expected=f"one of {', '.join(v.name for v in self.variants)}",
            found=name,
            remedy="name a variant of this bundle",
        )

    def paths(self) -> Iterator[str]:
        """Every path that the manifest names, files and folders."""
        yield from self.files
        yield from self.golden.values()
        yield self.step_tables
        yield self.tokenizer
        for variant in self.variants:
            yield from (engine.path for engine in variant.engines.values())
            for record in variant.compression.values():
                yield from record.paths()

    def to_json(self) -> str:
        """The manifest's bytes as text. Raises BundleError for an absolute path in any value."""
        data = self.model_dump(mode="json", by_alias=True)
        refuse_absolute_paths(data)
        return pretty_json(data)


def refuse_absolute_paths(data: Any, where: str = MANIFEST) -> None:
    """Raise BundleError where a string in `data` is or holds a path from the root of a disk.

    Such a path makes two builds differ, tells who built it, and means nothing elsewhere.
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            refuse_absolute_paths(str(key), where)
            refuse_absolute_paths(value, f"{where}: {key}")
    elif isinstance(data, list | tuple):
        for value in data:
            refuse_absolute_paths(value, where)
    elif isinstance(data, str) and ABSOLUTE.search(data):
        raise BundleError(
            where,
            expected="no absolute path: a bundle must not depend on the machine that built it",
            found=data,
            remedy="report this as a bug, with the profile that led here",
        )


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json. Raises BundleError; warns for a newer minor version."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, "a JSON document", str(error)) from error
    if not isinstance(data, dict):
        raise _unreadable(path, "a JSON object", type(data).__name__)
    check_schema(path, data.get("schema"), SCHEMA)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise _unreadable(path, f"a manifest of {SCHEMA}", list_mistakes(error)) from error


def check_schema(path: Path, found: Any, ours: str) -> None:
    """Refuse another schema or a newer major version; warn for a newer minor one."""
    name, _, version = ours.partition("/")
    major, minor = (int(part) for part in version.split("."))
    match = re.fullmatch(rf"{re.escape(name)}/(\d{{1,6}})\.(\d{{1,6}})", str(found))
    if match is None:
        raise _unreadable(path, f"schema {ours!r}", f"schema {found!r}")
    if int(match[1]) != major:
        newer = int(match[1]) > major
        raise BundleError(
            str(path),
            expected=f"schema {name}/{major}.x, which this version reads",
            found=f"schema {found}",
            remedy="pip install --upgrade diffoundry"
            if newer
            else "build the bundle again with this version",
        )
    if int(match[2]) > minor:
        warnings.warn(
            f"{path} has the newer schema {found}; this version knows {ours} and reads what it "
            "knows (pip install --upgrade diffoundry)",
            stacklevel=3,
        )


def list_mistakes(error: ValidationError) -> str:
    """Pydantic's findings on one line: where and what, without echoing long values."""
    return "; ".join(
        f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()
    )


def _unreadable(path: Path, expected: str, found: str) -> BundleError:
    return BundleError(
        str(path),
        expected=expected,
        found=found,
        remedy="get the bundle again from whoever made it, or build it again",
    )
