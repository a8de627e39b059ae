"""A driver of host memory and a stand-in for TensorRT's module; no GPU, and no engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffoundry.runtimes.tensorrt import bindings, driver
from tests.runtimes.tensorrt import fake_cuda, fake_trt


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module that our code gets in place of TensorRT's, on a host with one "GPU"."""
    fake_trt.now.reset()
    monkeypatch.setattr(driver, "LIBRARY", str(fake_cuda.library()))
    monkeypatch.setattr(bindings, "load", lambda *versions: fake_trt)
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
    yield fake_trt
    assert {what: fake_cuda.count(what) for what in ("held", "contexts", "streams", "graphs")} == {
        "held": 0,
        "contexts": 0,
        "streams": 0,
        "graphs": 0,
    }, "something was not freed"
