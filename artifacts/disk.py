"""Errors of the disk, said so that a user can act on them, and folders that vanish whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffoundry.errors import DiffoundryError, StageError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def explain(error: OSError, where: str, folder: Path) -> DiffoundryError | None:
    """The error a user should see for a full or closed disk, or None for any other OSError."""
    if error.errno in FULL:
        return StageError(
            where,
            expected=f"free space on the disk of {folder}",
            found=f"the disk is full ({error.strerror or error})",
            remedy="free space, or point DIFFOUNDRY_CACHE and --out at a larger disk, and run the "
            "same command again: what was finished is kept",
        )
    if error.errno in CLOSED:
        return UsageError(
            where,
            expected=f"a folder that can be written: {folder}",
            found=str(error),
            remedy="choose another folder (DIFFOUNDRY_CACHE for the store, --out for the bundle) "
            "or change its permissions",
        )
    return None


@contextlib.contextmanager
def explained(where: str, folder: Path) -> Iterator[None]:
    """Turn a full or closed disk inside the block into a StageError or UsageError."""
    try:
        yield
    except OSError as error:
        known = explain(error, where, folder)
        if known is None:
            raise
        raise known from error


def remove(path: Path) -> None:
    """Remove a file or folder; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def place(source: Path, target: Path) -> None:
    """Move a file or folder; where the two lie on different disks, copy and remove."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy(source, target)
        remove(source)


def copy(source: Path, target: Path) -> None:
    """Copy contents, not modes or times. Links inside are kept as links, to be refused later."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target, follow_symlinks=False)
