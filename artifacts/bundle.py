"""The bundle: written whole or not at all, opened without trusting it.

Writing goes into a hidden folder beside the target, which then takes the target's name in one
step. Opening reads the manifest and follows no path that leaves the folder or goes through a link.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diffoundry.artifacts.content import listed_digest
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.manifest import (
    EVIDENCE,
    MANIFEST,
    CompressionRecord,
    Manifest,
    VariantRecord,
    read_manifest,
)
from diffoundry.errors import ArtifactError, BundleError, UsageError
from diffoundry.formats.canonical import inside, sha256_file
from diffoundry.types import Artifact, Contract

# Left by desktops in every folder they show.
DROPPINGS = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `digest` is the manifest's, which stands for every file it lists."""

    path: Path
    manifest: Manifest
    digest: str
    hashes: HashCache = field(default_factory=lambda: HashCache(None), compare=False)

    def contract(self, component: str) -> Contract:
        """The component's contract. Raises BundleError."""
        if component not in self.manifest.contracts:
            raise BundleError(
                f"component {component!r}",
                expected=f"one of {', '.join(self.manifest.contracts)}",
                found=component,
                remedy="use a component of this bundle",
            )
        return self.manifest.contracts[component]

    def engine(self, variant: VariantRecord, component: str) -> Artifact:
        """The artifact of one engine, to be opened by the variant's runtime."""
        if component not in variant.engines:
            raise BundleError(
                f"variant {variant.name}",
                expected=f"one of {', '.join(variant.engines)}",
                found=component,
                remedy="choose a variant that has this component",
            )
        record = variant.engines[component]
        return Artifact(
            record.type,
            self._inside(record.path),
            record.digest,
            component,
            variant.name,
            record.lineage,
            record.contract,
        )

    def golden(self, name: str) -> Path:
        """Folder of the recording of a component, or of "pipeline". Raises BundleError."""
        if name not in self.manifest.golden:
            raise BundleError(
                f"golden vectors of {name}",
                expected=f"one of {', '.join(self.manifest.golden)}",
                found=name,
                remedy="build the bundle again: without golden vectors nothing can be checked",
            )
        return self._inside(self.manifest.golden[name])

    def compression(self, variant: VariantRecord, component: str) -> tuple[Path | None, list[Path]]:
        """Files of the quantization plan (None: not quantized) and of the prune records."""
        record = variant.compression.get(component, CompressionRecord())
        plan = self._inside(record.plan) if record.plan else None
        return plan, [self._inside(path) for path in record.prune]

    def simulation(self, variant: VariantRecord, component: str) -> Path | None:
        """Folder of what the compressed component computes; None where it was not compressed."""
        path = variant.compression.get(component, CompressionRecord()).simulation
        return self._inside(path) if path else None

    @property
    def step_tables(self) -> Path:
        return self._inside(self.manifest.step_tables)

    @property
    def tokenizer(self) -> Path:
        return self._inside(self.manifest.tokenizer)

    def verify_files(self, *, rehash: bool = True) -> list[str]:
        """Every difference between the folder and the manifest's list, in words.

        `rehash=False` trusts digests remembered for files whose identity has not changed.
        """
        found = dict(walk(self.path))
        problems = [f"{name}: is a link" for name, is_link in found.items() if is_link]
        for name, record in self.manifest.files.items():
            if name not in found:
                problems.append(f"{name}: is missing")
            elif not found[name]:
                problems += self._compare(name, record.digest, record.size_bytes, rehash)
        extra = sorted(set(found) - set(self.manifest.files))
        problems += [f"{name}: is not in the manifest" for name in extra if not found[name]]
        return problems

    def _compare(self, name: str, digest: str, size_bytes: int, rehash: bool) -> list[str]:
        path = self._inside(name)
        size = path.stat().st_size
        if size != size_bytes:
            return [f"{name}: has {size} bytes, not {size_bytes}"]
        if self.hashes.file_digest(path, rehash=rehash) != digest:
            return [f"{name}: its contents are not those that were published"]
        return []

    def _inside(self, relative: str) -> Path:
        return _safe(self.path, relative)


def open_bundle(path: Path, hashes: HashCache | None = None) -> Bundle:
    """Open a bundle: manifest read and checked, every path safe, contents not hashed yet.

    Needs no torch and no engine runtime. Raises UsageError where no such folder is, BundleError
    for everything wrong in it.
    """
    if not path.is_dir():
        raise UsageError(
            str(path),
            expected="the folder of a bundle",
            found="a file" if path.exists() else "no such folder",
            remedy="name a folder that `diffoundry build` made",
        )
    path = path.resolve()
    if not (path / MANIFEST).is_file() or (path / MANIFEST).is_symlink():
        raise BundleError(
            str(path),
            expected=f"a bundle: a folder with {MANIFEST}",
            found=f"no {MANIFEST}",
            remedy="name a folder that `diffoundry build` made",
        )
    manifest = read_manifest(path / MANIFEST)
    _check_paths(path, manifest)
    _check_parts(path, manifest)
    digest = sha256_file(path / MANIFEST)
    return Bundle(path, manifest, digest, hashes or HashCache(None))


def _check_paths(path: Path, manifest: Manifest) -> None:
    """Raise BundleError for a path that leaves the bundle or a link anywhere in it."""
    for relative in manifest.paths():
        _safe(path, relative)
        if relative == MANIFEST or relative.split("/")[0] == EVIDENCE:
            raise _broken(path, f"{relative} not in the list of files", "it is listed")
    links = [name for name, is_link in walk(path, evidence=True) if is_link]
    if links:
        raise _broken(path, "no links", f"links: {', '.join(links)}")


def _check_parts(path: Path, manifest: Manifest) -> None:
    """Raise BundleError where parts of the manifest contradict each other."""
    files = manifest.files
    parts = [manifest.step_tables, manifest.tokenizer, *manifest.golden.values()]
    for part in parts:
        if not listed_digest(part, files):
            raise _broken(path, f"files of {part} in the list of files", "none")
    for variant in manifest.variants:
        for component, engine in variant.engines.items():
            where = f"{variant.name}/{component}"
            if component not in manifest.contracts:
                raise _broken(path, f"a contract for {where}", "none")
            listed = listed_digest(engine.path, files)
            if listed != engine.digest:
                raise _broken(
                    path, f"engine {where} to be {engine.digest}", listed or "no listed file"
                )
        for component, record in variant.compression.items():
            missing = [one for one in record.paths() if not listed_digest(one, files)]
            if missing or component not in variant.engines:
                found = f"not listed: {', '.join(missing)}" if missing else "no such engine"
                raise _broken(path, f"what compressed {variant.name}/{component}", found)


def walk(path: Path, *, evidence: bool = False) -> Iterator[tuple[str, bool]]:
    """Each file and link below a bundle's folder as (relative path, is a link).

    The manifest, and evidence unless asked for, are left out; links are not followed.
    """
    for folder, names, files in os.walk(path):
        here = Path(folder)
        if here == path and not evidence and not (path / EVIDENCE).is_symlink():
            names[:] = [name for name in names if name != EVIDENCE]
        names.sort()
        linked = [name for name in names if (here / name).is_symlink()]
        for name in sorted([*files, *linked]):
            relative = (here / name).relative_to(path).as_posix()
            if relative != MANIFEST and name not in DROPPINGS:
                yield relative, (here / name).is_symlink()


def _safe(path: Path, relative: str) -> Path:
    try:
        return inside(path, relative)
    except ArtifactError as error:
        raise BundleError(
            f"bundle {path}: {error.where}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


def _broken(path: Path, expected: str, found: str) -> BundleError:
    return BundleError(
        f"bundle {path}",
        expected=expected,
        found=found,
        remedy="do not use this bundle; get it again from whoever made it, or build it again",
    )
