"""What every test runs under: a store of its own, no network, markers that skip with a reason.

The session's store is shared by the parallel test processes and removed at the end, so a build
of the embedded model that one test made is a cache hit for the next. A test that counts hits and
misses, or damages entries, points DIFFOUNDRY_CACHE at its own `tmp_path`.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

_OWN_STORE = pytest.StashKey[Path]()
_CONNECT = socket.socket.connect
_LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the controller; its workers inherit the environment
        store = Path(tempfile.mkdtemp(prefix="diffoundry-test-store-"))
        config.stash[_OWN_STORE] = store
        os.environ["DIFFOUNDRY_CACHE"] = str(store)
        _share_the_cores(config)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TERM"] = "dumb"
    os.environ["NO_COLOR"] = "1"
    os.environ["COLUMNS"] = "100"
    os.environ.pop("FORCE_COLOR", None)
    socket.socket.connect = _connect_only_locally  # type: ignore[method-assign, assignment]


def pytest_unconfigure(config: pytest.Config) -> None:
    socket.socket.connect = _CONNECT  # type: ignore[method-assign]
    store = config.stash.get(_OWN_STORE, None)
    if store is not None:
        shutil.rmtree(store, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "darwin":
        _skip_marked(items, "mac", "needs macOS")
    if not shutil.which("nvidia-smi"):
        _skip_marked(items, "gpu", "needs an NVIDIA GPU (no nvidia-smi here)")


def _skip_marked(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _share_the_cores(config: pytest.Config) -> None:
    """Give each test process its share: PyTorch would otherwise start a thread a core in each."""
    workers = config.getoption("numprocesses", default=None)
    processes = workers if isinstance(workers, int) and workers > 1 else 1
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _connect_only_locally(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX and address[0] not in _LOCAL_HOSTS:
        raise PermissionError(f"a test tried to reach the network: {address}")
    _CONNECT(self, address)
