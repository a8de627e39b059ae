"""A small bundle in a folder of its own, and a cache beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffoundry.artifacts.write_bundle import write_bundle
from tests.artifacts.tiny_bundle import tiny_content, tiny_measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def out(cache: None, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "out" / "bundle", tiny_content(tmp_path / "parts"), tiny_measured())
    return tmp_path / "out" / "bundle"
