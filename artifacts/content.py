"""What a bundle is made of, and where each part goes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffoundry.artifacts.manifest import (
    CompressionRecord,
    EngineRecord,
    FileRecord,
    Level,
    Manifest,
    ModelRecord,
    Power,
    Requirement,
    SamplingRecord,
    VariantRecord,
)
from diffoundry.artifacts.readme import readme_text
from diffoundry.errors import ArtifactError
from diffoundry.formats.canonical import canonical_json, files_under, sha256_bytes
from diffoundry.types import Artifact, Contract, Limits, Precision, ShapePolicy

README = "README.md"
STEP_TABLES = "steps"
TOKENIZER = "tokenizer"
GOLDEN = "golden"
COMPRESSION = "compression"
# What the tokenizer reads; model cards and whatever else lies in the folder stay behind.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class CompressionContent:
    """How a component was made smaller: JSON files of its quantization plan and of its prune
    records, in the order in which they were applied; and the folder of its simulation."""

    plan: Path | None = None
    prune: tuple[Path, ...] = ()
    simulation: Path | None = None


@dataclass(frozen=True)
class VariantContent:
    """One variant that passed. `engines` is component -> artifact; `requires` is distribution ->
    lowest version; `extra` is the extra of pyproject.toml that installs them; `compression` is
    component -> its records, for those components only that were made smaller."""

    name: str
    runtime: str
    device: str
    precision: Precision
    shape_policy: ShapePolicy
    engines: Mapping[str, Artifact]
    limits: Mapping[Level, Limits]
    extra: str = ""
    requires: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    power: Power | None = None
    compression: Mapping[str, CompressionContent] = field(default_factory=dict)


@dataclass(frozen=True)
class BundleContent:
    """Everything that goes into a bundle; nothing of it may depend on the building machine.

    `golden` is component, or "pipeline", -> folder of its evaluation recording. `tokenizer` is
    the model's tokenizer folder. `extra_files` is path in the bundle -> file or folder.
    """

    model: ModelRecord
    profile: str
    contracts: Mapping[str, Contract]
    variants: tuple[VariantContent, ...]
    sampling: SamplingRecord
    golden: Mapping[str, Path]
    step_tables: Path
    tokenizer: Path
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra_files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A bundle on paper: its manifest, the source of each file, and the generated texts."""

    manifest: Manifest
    sources: Mapping[str, Path]
    texts: Mapping[str, str]


def lay_out(content: BundleContent, digest: Callable[[Path], str]) -> Layout:
    """Decide every file of the bundle; `digest` hashes one file.

    Raises ArtifactError for a source that is missing or holds a link.
    """
    sources: dict[str, Path] = {}
    for name, file in _tokenizer_files(content.tokenizer).items():
        sources[f"{TOKENIZER}/{name}"] = file
    for target, source in _folders(content).items():
        sources.update(_spread(target, source))
    records = {
        target: FileRecord(digest=digest(file), size_bytes=file.stat().st_size)
        for target, file in sources.items()
    }
    draft = _manifest(content, records)
    readme = readme_text(draft)
    raw = readme.encode()
    records[README] = FileRecord(digest=sha256_bytes(raw), size_bytes=len(raw))
    manifest = draft.model_copy(update={"files": dict(sorted(records.items()))})
    return Layout(manifest, sources, {README: readme})


def engine_path(variant: str, component: str, artifact: Artifact) -> str:
    """Where an engine goes: a folder, or a file that keeps its suffix."""
    suffix = "" if artifact.path.is_dir() else artifact.path.suffix
    return f"engines/{variant}/{component}{suffix}"


def compression_paths(
    variant: str, component: str, content: CompressionContent
) -> tuple[CompressionRecord, dict[str, Path]]:
    """Where a component's records go: their paths, and each path with its source."""
    folder = f"{COMPRESSION}/{variant}/{component}"
    names = ["prune.json", *(f"prune-{n}.json" for n in range(2, len(content.prune) + 1))]
    placed = {
        f"{folder}/{name}": source for name, source in zip(names, content.prune, strict=False)
    }
    record = CompressionRecord(
        prune=tuple(placed),
        plan=f"{folder}/plan.json" if content.plan else None,
        simulation=f"{folder}/simulation" if content.simulation else None,
    )
    for target, source in ((record.plan, content.plan), (record.simulation, content.simulation)):
        if target and source:
            placed[target] = source
    return record, placed


def listed_under(path: str, files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """The listed files at or below `path`, by their path relative to it ("" for a file)."""
    if path in files:
        return {"": files[path]}
    prefix = path.rstrip("/") + "/"
    return {
        name.removeprefix(prefix): record
        for name, record in files.items()
        if name.startswith(prefix)
    }


def listed_digest(path: str, files: Mapping[str, FileRecord]) -> str:
    """What `canonical.tree_digest` of `path` is, by the list of files. "" where none is listed."""
    below = listed_under(path, files)
    if "" in below:
        return below[""].digest
    if not below:
        return ""
    return sha256_bytes(canonical_json({name: record.digest for name, record in below.items()}))


def _folders(content: BundleContent) -> dict[str, Path]:
    placed = {STEP_TABLES: content.step_tables, **content.extra_files}
    for name, recording in content.golden.items():
        placed[f"{GOLDEN}/{name}"] = recording
    for variant in content.variants:
        for component, artifact in variant.engines.items():
            placed[engine_path(variant.name, component, artifact)] = artifact.path
        for component, content_of in variant.compression.items():
            placed.update(compression_paths(variant.name, component, content_of)[1])
    return placed


def _spread(target: str, source: Path) -> dict[str, Path]:
    """Each file of `source` with its path in the bundle."""
    if not source.exists():
        raise ArtifactError(f"{target} of the bundle", expected=str(source), found="nothing")
    if source.is_file():
        return {target: source}
    return {f"{target}/{file.relative_to(source).as_posix()}": file for file in files_under(source)}


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files. Links are followed here: the hub's cache is made of them."""
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not found:
        raise ArtifactError(
            f"tokenizer {folder}", expected=" or ".join(TOKENIZER_FILES), found="none of them"
        )
    return {name: file.resolve() for name, file in found.items()}


def _manifest(content: BundleContent, files: Mapping[str, FileRecord]) -> Manifest:
    return Manifest(
        model=content.model,
        profile=content.profile,
        contracts=dict(sorted(content.contracts.items())),
        variants=tuple(_variant(variant, files) for variant in content.variants),
        sampling=content.sampling,
        golden={name: f"{GOLDEN}/{name}" for name in sorted(content.golden)},
        step_tables=STEP_TABLES,
        tokenizer=TOKENIZER,
        tools=dict(sorted(content.tools.items())),
        notes=content.notes,
        files=dict(files),
    )


def _variant(variant: VariantContent, files: Mapping[str, FileRecord]) -> VariantRecord:
    engines = {}
    for component, artifact in sorted(variant.engines.items()):
        path = engine_path(variant.name, component, artifact)
        engines[component] = EngineRecord(
            path=path,
            type=artifact.type,
            digest=listed_digest(path, files),
            size_bytes=sum(record.size_bytes for record in listed_under(path, files).values()),
            contract=artifact.contract,
            lineage=artifact.lineage,
        )
    return VariantRecord(
        name=variant.name,
        runtime=variant.runtime,
        device=variant.device,
        precision=variant.precision,
        shape_policy=variant.shape_policy,
        engines=engines,
        limits=dict(variant.limits),
        extra=variant.extra,
        requires=tuple(
            Requirement(distribution=name, at_least=version)
            for name, version in sorted(variant.requires.items())
        ),
        notes=variant.notes,
        power=variant.power,
        compression={
            component: compression_paths(variant.name, component, one)[0]
            for component, one in sorted(variant.compression.items())
        },
    )
