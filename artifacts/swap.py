"""Puts a finished folder in another's place so that a crash leaves the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

from diffoundry.artifacts import disk

AT_FDCWD = -100  # from fcntl.h on Linux
EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h; RENAME_SWAP of macOS has the same value


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Make `target` be the folder `new`; the folder that was there is removed afterwards.

    Uses the kernel's atomic exchange of two names. Where there is none, the old folder waits at
    `aside` for the moment between two renames: `recover` brings it back after a crash.
    """
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):
        disk.remove(new)
        return
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    disk.remove(aside)


def recover(target: Path, aside: Path) -> None:
    """Undo a `put_in_place` that was killed between its two renames, or finish its cleaning."""
    if not aside.exists():
        return
    if target.exists():
        disk.remove(aside)
    else:
        os.rename(aside, target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(first), os.fsencode(second))
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        result = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        result = libc.renamex_np(*names, EXCHANGE)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
