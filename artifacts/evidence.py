"""evidence/<host>.json: what was measured on one host about one manifest.

Never part of the manifest: a bundle stays byte-equal wherever it is built, while its evidence
grows on every host that checks it.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from diffoundry.artifacts.gain import VariantGain
from diffoundry.artifacts.manifest import (
    DIGEST,
    EVIDENCE,
    Record,
    check_schema,
    list_mistakes,
)
from diffoundry.errors import BundleError
from diffoundry.formats.canonical import atomic_write, inside, pretty_json
from diffoundry.types import ParityResult

SCHEMA = "diffoundry.evidence/1.3"
BUILT_ENGINES = "engines"
"""Folder of evidence/ with the engines that hosts built: HOST/VARIANT/COMPONENT."""
# The folders of an absolute path, up to its last slash.
FOLDERS = re.compile(r"(?<![\w.…/])(?:[A-Za-z]:[\\/]|~?/)(?:[^\s/\\'\":;,]+[\\/])+")
PACKAGES = ("diffoundry", "numpy", "torch", "diffusers", "transformers", "onnx", "onnxruntime")


class HostRecord(Record):
    """Where something was measured."""

    name: str
    system: str
    machine: str
    processor: str
    cores: int
    python: str
    packages: dict[str, str] = {}


class StageMeasure(Record):
    """What one stage cost when it ran (it may have run in an earlier build)."""

    stage: str
    component: str | None = None
    key: str | None = None
    seconds: float
    peak_memory_bytes: int


class BuiltEngine(Record):
    """An engine that this host built from a variant's build specification.

    `path` is its folder, relative to the bundle, below evidence/; `digest` and `size_bytes` are
    that folder's; `built_on` is the fingerprint that decides where else it may run.
    """

    path: str
    digest: str = Field(pattern=DIGEST)
    size_bytes: int
    built_on: dict[str, Any]


class VariantEvidence(Record):
    """What is known of one variant on this host. `results` has one entry an engine and one for
    the pipeline; `precision_used` is component -> what its runtime read back; `completed` are
    checks that were deferred elsewhere and ran here; `engines` is component -> the engine that
    was built here. `gain` is what the build measured of a compressed variant. `bench` is what
    `bench --save` measured, `prompt_accuracy` (0 to 1) what it read back from pictures."""

    results: tuple[ParityResult, ...] = ()
    precision_used: dict[str, dict[str, Any]] = {}
    size_bytes: int | None = None
    completed: tuple[str, ...] = ()
    engines: dict[str, BuiltEngine] = {}
    gain: VariantGain | None = None
    bench: dict[str, Any] | None = None
    prompt_accuracy: float | None = Field(default=None, ge=0, le=1)


class Evidence(Record):
    """Everything measured on one host about the manifest with this digest.

    `baselines` are the contenders of a bench that are no variants: PyTorch's.
    """

    schema_: str = Field(default=SCHEMA, alias="schema")
    manifest_digest: str = Field(pattern=DIGEST)
    host: HostRecord
    updated: str
    variants: dict[str, VariantEvidence] = {}
    stages: tuple[StageMeasure, ...] = ()
    baselines: dict[str, dict[str, Any]] = {}

    def to_json(self) -> str:
        """The file's text; paths of this machine in messages are cut to their last part."""
        return pretty_json(without_folders(self.model_dump(mode="json", by_alias=True)))


def this_host(packages: Sequence[str] = PACKAGES) -> HostRecord:
    """Describe the machine that this runs on; nothing is imported to read versions."""
    from importlib import metadata

    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return HostRecord(
        name=host_name(),
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        packages=versions,
    )


def host_name() -> str:
    """The short host name, as a file name: a-z, 0-9, dots and dashes."""
    short = platform.node().split(".")[0].lower()
    return re.sub(r"[^a-z0-9-]+", "-", short).strip("-") or "host"


def evidence_path(bundle: Path, host: str | None = None) -> Path:
    """Where the evidence of `host` (default: this one) stands. Raises ArtifactError for a link."""
    return inside(bundle, f"{EVIDENCE}/{host or host_name()}.json")


def new_evidence(
    manifest_digest: str,
    variants: Mapping[str, VariantEvidence],
    stages: Sequence[StageMeasure] = (),
    baselines: Mapping[str, dict[str, Any]] | None = None,
) -> Evidence:
    """Evidence of this host and this moment."""
    return Evidence(
        manifest_digest=manifest_digest,
        host=this_host(),
        updated=datetime.now(UTC).isoformat(timespec="seconds"),
        variants=dict(variants),
        stages=tuple(stages),
        baselines=dict(baselines or {}),
    )


def read_evidence(path: Path) -> Evidence:
    """Read one evidence file. Raises BundleError."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(data, dict):
        raise _unreadable(path, type(data).__name__)
    check_schema(path, data.get("schema"), SCHEMA)
    try:
        return Evidence.model_validate(data)
    except ValidationError as error:
        raise _unreadable(path, list_mistakes(error)) from error


def update_evidence(bundle: Path, new: Evidence) -> Path:
    """Merge `new` into this host's file, written atomically; returns its path.

    What was measured of a variant replaces its old figures, and what was not measured stays;
    completed checks add up. Evidence of another manifest, or that cannot be read, is replaced
    whole.
    """
    path = evidence_path(bundle, new.host.name)
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        try:
            new = _merge(read_evidence(path), new)
        except BundleError:
            pass  # unreadable evidence proves nothing: what was measured now stands alone
    atomic_write(path, new.to_json())
    return path


def _merge(old: Evidence, new: Evidence) -> Evidence:
    if old.manifest_digest != new.manifest_digest:
        return new
    variants = dict(old.variants)
    for name, variant in new.variants.items():
        before = variants.get(name, VariantEvidence())
        completed = dict.fromkeys((*before.completed, *variant.completed))
        variants[name] = variant.model_copy(
            update={
                "completed": tuple(completed),
                "precision_used": {**before.precision_used, **variant.precision_used},
                "engines": {**before.engines, **variant.engines},
                "size_bytes": variant.size_bytes or before.size_bytes,
                "results": variant.results or before.results,
                "gain": variant.gain or before.gain,
                "bench": variant.bench or before.bench,
                "prompt_accuracy": (
                    before.prompt_accuracy
                    if variant.prompt_accuracy is None
                    else variant.prompt_accuracy
                ),
            }
        )
    update = {
        "variants": variants,
        "stages": new.stages or old.stages,
        "baselines": {**old.baselines, **new.baselines},
    }
    return new.model_copy(update=update)


def without_folders(data: Any) -> Any:
    """Shorten every absolute path in the strings of `data` to its last part."""
    if isinstance(data, dict):
        return {key: without_folders(value) for key, value in data.items()}
    if isinstance(data, list):
        return [without_folders(value) for value in data]
    return FOLDERS.sub("…/", data) if isinstance(data, str) else data


def _processor() -> str:
    """The processor's model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _unreadable(path: Path, found: str) -> BundleError:
    return BundleError(
        str(path),
        expected=f"evidence of {SCHEMA}",
        found=found,
        remedy="delete this file and run `diffoundry verify --complete`",
    )
