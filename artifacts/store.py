"""The content-addressed store: what each stage made, found again by the key of its making.

    entries/<key hex>/<output name>   what a stage wrote (a file or a folder)
    entries/<key hex>/entry.json      its record, written last before the rename
    work/<name>/                      folders of running stages, each with a lock beside it
    locks/  logs/  journals/  digests.sqlite

An entry appears by one rename, so it is there whole or not at all, whenever a build is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffoundry.artifacts import disk
from diffoundry.artifacts.entry import (
    FORMAT,
    Entry,
    NewOutput,
    Record,
    SavedEntry,
    SavedOutput,
    StoredOutput,
    damaged,
    read_record,
    write_record,
)
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.errors import ArtifactError, StageError
from diffoundry.folders import cache_root as default_root
from diffoundry.formats.canonical import files_under

__all__ = ["Entry", "NewOutput", "Record", "Store", "StoredOutput", "default_root"]

RECORD = "entry.json"


class Store:
    """Finished stages on disk. Several builds may use one store at once.

    `report(line)` is called when a damaged entry is dropped, a stale folder is cleaned, or
    another build is being waited for.
    """

    def __init__(
        self, root: Path | None = None, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.root = (root or default_root()).absolute()
        self.report = report
        with disk.explained(f"store {self.root}", self.root):
            for name in ("entries", "work", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        self.hashes = HashCache(self.root / "digests.sqlite")
        self._guard = self._file_lock(self.root / "locks" / "store.lock")

    def lookup(self, key: str, *, rehash: bool = False) -> Entry | None:
        """The entry of `key`, verified, or None.

        A damaged entry is reported and removed, so that its stage runs again. `rehash` reads
        every byte even of files that look untouched.
        """
        folder = self._folder(key)
        if not folder.exists():
            return None
        try:
            return self._load(key, rehash)
        except ArtifactError as error:
            self._drop(key, error, rehash)
            return None

    def publish(self, key: str, outputs: Mapping[str, NewOutput], record: Record) -> Entry:
        """Move `outputs` into the store as the entry of `key`.

        Where another build has published the same key meanwhile, its entry is returned and ours
        is thrown away. Raises StageError when an output is missing or the disk is full (then
        nothing is left behind), ArtifactError for an output that holds a link.
        """
        where = f"store: publishing {record.stage} {record.component or ''}".rstrip()
        with disk.explained(where, self.root), self.work_folder(key) as staging:
            saved = {
                name: self._stage_output(where, name, output, staging)
                for name, output in outputs.items()
            }
            write_record(staging / RECORD, SavedEntry(FORMAT, key, saved, record))
            with self._guard:
                present = self.lookup(key)
                if present is not None:
                    return present
                os.rename(staging, self._folder(key))
            self.hashes.moved(staging, self._folder(key))
            self.journal(key).unlink(missing_ok=True)
        return self._load(key, rehash=False)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the right to make `key`; look it up again inside: the one before may have made it.

        The operating system gives the lock back when its holder dies.
        """
        from filelock import Timeout

        lock = self._file_lock(self.root / "locks" / f"{_hex(key)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.report(f"another build is making {_hex(key)[:12]}: waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def work_folder(self, key: str) -> Iterator[Path]:
        """An empty folder on the store's disk, removed at the end; of a dead owner, next time."""
        folder = self.root / "work" / f"{_hex(key)[:12]}-{secrets.token_hex(6)}"
        owner = self._file_lock(folder.with_suffix(".lock"))
        with disk.explained(f"store {self.root}", self.root), self._guard:
            self._clean_stale()
            owner.acquire()
            folder.mkdir()
        try:
            yield folder
        finally:
            if folder.exists():
                disk.remove(folder)
            owner.release()
            folder.with_suffix(".lock").unlink(missing_ok=True)

    def journal(self, key: str) -> Path:
        """Where the stage of `key` may write down as it goes; kept until the key is published."""
        folder = self.root / "journals"
        with disk.explained(f"store {self.root}", self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{_hex(key)}.jsonl"

    def digest_of(self, path: Path, function: Callable[[Path], str]) -> str:
        """`function(path)`, remembered while nothing below `path` changes."""
        return self.hashes.digest_of(path, function)

    def _stage_output(self, where: str, name: str, output: NewOutput, staging: Path) -> SavedOutput:
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise StageError(where, expected="an output name of a-z, 0-9, _", found=name)
        if not output.path.exists():
            raise StageError(
                where,
                expected=f"output {name!r} at {output.path.name}",
                found="no such file or folder",
                remedy="the stage did not write what it returned: report this as a bug",
            )
        target = staging / name
        disk.place(output.path, target)
        size_bytes = sum(file.stat().st_size for file in files_under(target))
        digest = self.hashes.tree_digest(target)
        return SavedOutput(output.type, digest, size_bytes, output.contract)

    def _load(self, key: str, rehash: bool) -> Entry:
        """Read and verify an entry. Raises ArtifactError that says what is damaged."""
        folder = self._folder(key)
        saved = read_record(folder / RECORD)
        if saved.key != key or saved.format != FORMAT:
            raise damaged(folder, f"key {key}", f"a record of {saved.key}")
        outputs = {}
        for name, output in saved.outputs.items():
            path = folder / name
            try:
                digest = self.hashes.tree_digest(path, rehash=rehash)
            except OSError as error:
                raise damaged(path, "what the stage wrote", str(error)) from error
            if digest != output.digest:
                raise damaged(path, output.digest, digest)
            outputs[name] = StoredOutput(
                path, output.type, digest, output.size_bytes, output.contract
            )
        return Entry(key, outputs, saved.record)

    def _drop(self, key: str, error: ArtifactError, rehash: bool) -> None:
        with self._guard:
            try:
                self._load(key, rehash)
            except ArtifactError:
                # One rename, so that nobody ever sees an entry that is half removed.
                doomed = self.root / "work" / f"damaged-{secrets.token_hex(6)}"
                try:
                    os.rename(self._folder(key), doomed)
                except FileNotFoundError:
                    return
                disk.remove(doomed)
                self.report(
                    f"a damaged store entry was removed and is made again: {error.where}"
                    f" (expected {error.expected}, found {error.found})"
                )

    def _clean_stale(self) -> None:
        """Remove the work folders whose owners are dead. Call with the guard held."""
        from filelock import Timeout

        for folder in (self.root / "work").iterdir():
            if not folder.is_dir():
                continue
            owner = self._file_lock(folder.with_suffix(".lock"))
            try:
                owner.acquire(timeout=0)
            except Timeout:
                continue
            disk.remove(folder)
            owner.release()
            folder.with_suffix(".lock").unlink(missing_ok=True)
            self.report(f"cleaned up after a build that was killed: {folder.name}")

    def _folder(self, key: str) -> Path:
        return self.root / "entries" / _hex(key)

    def _file_lock(self, path: Path) -> Any:
        from filelock import FileLock

        return FileLock(path)


def _hex(key: str) -> str:
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", key)
    if match is None:
        raise ArtifactError(f"key {key!r}", expected="sha256:<64 hex digits>", found=key)
    return match[1]
