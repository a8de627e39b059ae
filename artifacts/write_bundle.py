"""Publishes a bundle: assembled beside its target, validated, put in place in one step."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffoundry.artifacts import disk, swap
from diffoundry.artifacts.bundle import Bundle, open_bundle, walk
from diffoundry.artifacts.content import BundleContent, Layout, lay_out
from diffoundry.artifacts.evidence import (
    BUILT_ENGINES,
    StageMeasure,
    VariantEvidence,
    new_evidence,
    update_evidence,
)
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.manifest import EVIDENCE, MANIFEST, SCHEMA
from diffoundry.artifacts.store import default_root
from diffoundry.errors import BundleError, DiffoundryError, UsageError
from diffoundry.formats.canonical import sha256_bytes

SEARCHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Measured:
    """What this build measured, for evidence/<host>.json."""

    variants: Mapping[str, VariantEvidence] = field(default_factory=dict)
    stages: tuple[StageMeasure, ...] = ()


@dataclass(frozen=True)
class Written:
    """A bundle that stands. `changed` is False where the same one stood there already."""

    bundle: Bundle
    changed: bool


def check_output_folder(out: Path) -> None:
    """Raise UsageError where no bundle could be written to `out`: to be asked before the work.

    Writable, and absent, empty, or a bundle that holds nothing but itself.
    """
    out = out.absolute()
    where = f"output folder {out}"
    _refuse_foreign(out)
    with disk.explained(where, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass


def write_bundle(
    out: Path,
    content: BundleContent,
    measured: Measured | None = None,
    hashes: HashCache | None = None,
) -> Written:
    """Publish `content` at `out`.

    The same bundle, intact, stays where it is and only evidence is added. Killed, interrupted
    or out of disk at any moment, `out` is the old bundle or the new one; what was left beside
    it is cleaned by the next call. Raises UsageError (folder cannot be used), StageError (disk
    full), ArtifactError (a part is missing or holds a link), BundleError (a part names the
    building machine).
    """
    out = Path(os.path.realpath(out))
    measured = measured or Measured()
    hashes = hashes or HashCache(None)
    with _only_writer(out):
        check_output_folder(out)
        layout = lay_out(content, hashes.file_digest)
        text = layout.manifest.to_json()
        with disk.explained(f"publishing the bundle {out}", out.parent):
            bundle = _same_bundle(out, text, hashes)
            if bundle is None:
                _publish(out, layout, text, measured, hashes)
                return Written(open_bundle(out, hashes), changed=True)
            update_evidence(out, new_evidence(bundle.digest, measured.variants, measured.stages))
    return Written(bundle, changed=False)


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold the right to write `out`, and finish or undo what a killed writer left beside it."""
    from filelock import FileLock

    locks = default_root() / "locks"
    with disk.explained(f"store {locks.parent}", locks):
        locks.mkdir(parents=True, exist_ok=True)
    name = sha256_bytes(os.fsencode(out)).removeprefix("sha256:")[:16]
    with FileLock(locks / f"bundle-{name}.lock"):
        with disk.explained(f"output folder {out}", out.parent):
            swap.recover(out, _aside(out))
            for leftover in out.parent.glob(f".{out.name}.partial-*"):
                disk.remove(leftover)
        yield


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _same_bundle(out: Path, manifest: str, hashes: HashCache) -> Bundle | None:
    """The bundle at `out` where it is the one `manifest` describes, with intact files."""
    path = out / MANIFEST
    if not path.is_file() or path.read_bytes() != manifest.encode():
        return None
    try:
        bundle = open_bundle(out, hashes)
    except DiffoundryError:
        return None  # damaged since: it is written again
    return None if bundle.verify_files(rehash=False) else bundle


def _publish(
    out: Path, layout: Layout, manifest: str, measured: Measured, hashes: HashCache
) -> None:
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        _fill(partial, layout, manifest)
        bundle = open_bundle(partial, hashes)
        problems = bundle.verify_files()
        if problems:
            raise BundleError(
                f"publishing the bundle {out}",
                expected="the files that were laid out",
                found="; ".join(problems),
                remedy="another process changed the store meanwhile: run the build again",
            )
        _refuse_machine_paths(partial, layout)
        if (out / MANIFEST).is_file() and (out / MANIFEST).read_bytes() == manifest.encode():
            _keep_evidence(out, partial)
        update_evidence(partial, new_evidence(bundle.digest, measured.variants, measured.stages))
        swap.put_in_place(partial, out, _aside(out))
        hashes.moved(partial, out)
    finally:
        disk.remove(partial)


def _fill(folder: Path, layout: Layout, manifest: str) -> None:
    for name, source in layout.sources.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        disk.copy(source, target)
    for name, text in layout.texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / MANIFEST).write_bytes(manifest.encode())


def _keep_evidence(old: Path, new: Path) -> None:
    """A bundle that is repaired keeps what other hosts measured of the same manifest."""
    if (old / EVIDENCE).is_dir() and not (old / EVIDENCE).is_symlink():
        built = old / EVIDENCE / BUILT_ENGINES
        for path in [*(old / EVIDENCE).glob("*.json"), *([built] if built.is_dir() else [])]:
            if not any(one.is_symlink() for one in (path, *path.rglob("*"))):
                (new / EVIDENCE).mkdir(exist_ok=True)
                disk.copy(path, new / EVIDENCE / path.name)


def _refuse_machine_paths(folder: Path, layout: Layout) -> None:
    """Raise BundleError where a file holds the folder that one of the sources came from."""
    sources = {os.fsencode(source.parent) for source in layout.sources.values()}
    wanted = sorted(root for root in {os.fsencode(default_root()), *sources} if len(root) > 5)
    for name in layout.sources:
        with (folder / name).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if not 0 < size <= SEARCHED_BYTES:
                continue
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                found = [root for root in wanted if memory.find(root) >= 0]
        if found:
            raise BundleError(
                f"{name} of the bundle",
                expected="no path of the building machine in any file",
                found=os.fsdecode(found[0]),
                remedy="report this as a bug: the format of this file is not made canonical",
            )


def _refuse_foreign(out: Path) -> None:
    """Raise UsageError for a file, or for a folder with anything that is not a bundle's."""
    where = f"output folder {out}"
    if out.exists() and not out.is_dir():
        raise UsageError(where, expected="a folder", found="a file", remedy="choose another --out")
    with disk.explained(where, out):
        if not out.is_dir() or not any(out.iterdir()):
            return
    remedy = "choose another --out, or move what is there yourself"
    listed = _listed_files(out / MANIFEST)
    if listed is None:
        raise UsageError(
            where,
            expected="an absent or empty folder, or a bundle",
            found="a folder with other things in it",
            remedy=remedy,
        )
    extra = [name for name, _ in walk(out) if name not in listed]
    if extra:
        raise UsageError(
            where,
            expected="a bundle with nothing else in it, since it is replaced whole",
            found=f"files that are not part of it: {', '.join(extra[:5])}",
            remedy=remedy,
        )


def _listed_files(manifest: Path) -> set[str] | None:
    """What the manifest of any version lists; None where it is no bundle's manifest."""
    try:
        data = json.loads(manifest.read_bytes())
        if str(data["schema"]).partition("/")[0] == SCHEMA.partition("/")[0]:
            return set(data["files"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
