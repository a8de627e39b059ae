"""Digests remembered by a file's identity, so that an unchanged file is hashed once.

A file counts as unchanged while its size, inode, mtime and ctime stay. Damage by hand moves the
ctime even where the mtime was put back.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffoundry.formats.canonical import canonical_json, files_under, sha256_bytes, sha256_file

# Two writes within one tick of the file system's clock leave the same mtime (10 ms on Linux with
# HZ=100), so a file this fresh is hashed but not remembered.
FRESH_NS = 50_000_000


class HashCache:
    """A small sqlite file of `path, identity -> digest`. A damaged one is thrown away.

    Safe for several processes. `path=None` remembers nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def file_digest(self, path: Path, *, rehash: bool = False) -> str:
        """sha256 of one file, from memory when its identity is known."""
        return self._remembered(path, "file", lambda: _identity(path), sha256_file, rehash)

    def tree_digest(self, path: Path, *, rehash: bool = False) -> str:
        """The same digest as `canonical.tree_digest`. Raises ArtifactError for a link."""
        if path.is_file() and not path.is_symlink():
            return self.file_digest(path, rehash=rehash)
        listing = {
            file.relative_to(path).as_posix(): self.file_digest(file, rehash=rehash)
            for file in files_under(path)
        }
        return sha256_bytes(canonical_json(listing))

    def digest_of(self, path: Path, function: Callable[[Path], str]) -> str:
        """`function(path)`, from memory while no file below `path` and no line of the module
        that defines `function` has changed. Links are followed: the hub's cache is made of them.
        """
        what = f"{function.__module__}.{function.__qualname__} {_source_digest(function)}"
        return self._remembered(path, what, lambda: _tree_identity(path), function, rehash=False)

    def moved(self, old: Path, new: Path) -> None:
        """Carry what is known about files below `old` over to `new`, after a rename."""
        prefix = os.path.abspath(old) + os.sep
        self._ask(
            "UPDATE OR REPLACE digests SET path = ? || substr(path, ?) "
            "WHERE substr(path, 1, ?) = ?",
            (os.path.abspath(new) + os.sep, len(prefix) + 1, len(prefix), prefix),
        )

    def _remembered(
        self,
        path: Path,
        what: str,
        identify: Callable[[], tuple[str, int]],
        function: Callable[[Path], str],
        rehash: bool,
    ) -> str:
        name = os.path.abspath(path)
        identity, newest = identify()
        if not rehash:
            known = self._read(name, what, identity)
            if known is not None:
                return known
        fresh = time.time_ns() - newest < FRESH_NS
        digest = function(path)
        # A file that changed while it was read has no digest worth remembering.
        if not fresh and identify()[0] == identity:
            self._write(name, what, identity, digest)
        return digest

    def _read(self, name: str, what: str, identity: str) -> str | None:
        query = "SELECT digest FROM digests WHERE path=? AND what=? AND identity=?"
        row = self._ask(query, (name, what, identity))
        return str(row[0]) if row else None

    def _write(self, name: str, what: str, identity: str, digest: str) -> None:
        row = (name, what, identity, digest)
        self._ask("INSERT OR REPLACE INTO digests VALUES (?,?,?,?)", row)

    def _ask(self, statement: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Run one statement; None where the cache cannot be used, which only costs time."""
        if self._path is None:
            return None
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=10)) as connection:
                connection.execute("PRAGMA synchronous=OFF")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS digests "
                    "(path TEXT, what TEXT, identity TEXT, digest TEXT, PRIMARY KEY (path, what))"
                )
                row: tuple[Any, ...] | None = connection.execute(statement, values).fetchone()
                connection.commit()
                return row
        except sqlite3.OperationalError:  # locked for long, disk full, folder closed
            return None
        except sqlite3.DatabaseError:  # not a database any more
            self._path.unlink(missing_ok=True)
            return None


def _identity(path: Path) -> tuple[str, int]:
    """What tells a file from a changed one, and its newest time in ns."""
    stat = os.stat(path)
    parts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return ":".join(str(part) for part in parts), max(stat.st_mtime_ns, stat.st_ctime_ns)


def _tree_identity(path: Path) -> tuple[str, int]:
    if not path.is_dir():
        return _identity(path)
    found: dict[str, str] = {}
    newest = 0
    for folder, _, names in os.walk(path, followlinks=True):
        for name in names:
            file = Path(folder) / name
            if file.is_file():
                found[file.relative_to(path).as_posix()], changed = _identity(file)
                newest = max(newest, changed)
    return sha256_bytes(canonical_json(found)), newest


def _source_digest(function: Callable[[Path], str]) -> str:
    """Digest of the module that defines `function`: changed code must not find old answers."""
    try:
        return sha256_bytes(inspect.getsource(sys.modules[function.__module__]).encode())
    except (OSError, TypeError, KeyError):
        return "unknown"
