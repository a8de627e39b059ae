"""Canonical JSON, digests of files and folders, and paths that stay inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from diffoundry.errors import ArtifactError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Turn dataclasses, models, paths and tuples into JSON data (pydantic's rules).

    NaN and infinity stay what they are, so that `canonical_json` refuses them.
    """
    from pydantic import ConfigDict, TypeAdapter

    adapter = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))
    return adapter.dump_python(value, mode="json")


def parse(kind: type[T], data: Any) -> T:
    """Turn JSON data back into `kind` (a dataclass or model). Raises pydantic.ValidationError."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(data)


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no white space, no NaN, UTF-8: the bytes that keys and digests are made of."""
    text = json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def pretty_json(value: Any) -> str:
    """Sorted keys, indented, with a final newline: for files that people read."""
    text = json.dumps(plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def sha256_bytes(data: bytes) -> str:
    """Digest of `data` as "sha256:<hex>"."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of one file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def files_under(path: Path) -> Iterator[Path]:
    """Every file below `path` in a fixed order (the path itself when it is a file).

    Raises ArtifactError for a link: contents outside the folder must not count as inside.
    """
    if path.is_symlink():
        raise ArtifactError(str(path), expected="a file or folder", found="a link")
    if path.is_file():
        yield path
        return
    for child in sorted(path.iterdir(), key=lambda p: p.name):
        yield from files_under(child)


def tree_digest(path: Path) -> str:
    """Digest of a file, or of a folder's relative names and contents."""
    if path.is_file() and not path.is_symlink():
        return sha256_file(path)
    listing = {p.relative_to(path).as_posix(): sha256_file(p) for p in files_under(path)}
    return sha256_bytes(canonical_json(listing))


def tree_size_bytes(path: Path) -> int:
    """Bytes of a file, or of every file below a folder."""
    return sum(os.stat(p).st_size for p in files_under(path))


def inside(folder: Path, relative: str) -> Path:
    """Join a path that came from a manifest or archive to its folder.

    Raises ArtifactError for absolute paths, "..", backslashes, drive letters and links, so
    that nothing outside `folder` can be named.
    """
    pure = PurePosixPath(relative)
    bad = (
        not relative
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in relative
        or ":" in relative
        or "\0" in relative
    )
    path = folder
    for part in () if bad else pure.parts:
        path = path / part
        bad = bad or path.is_symlink()
    if bad:
        raise ArtifactError(
            f"path {relative!r} in {folder}",
            expected="a relative path that stays inside the folder, through no link",
            found=relative,
            remedy="do not use this folder; get it again from whoever made it",
        )
    return path


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that readers see the old contents or the new, never half."""
    import tempfile

    raw = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
