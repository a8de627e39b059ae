"""Keys: whatever can change an output changes its key, helpers' sources included."""

from __future__ import annotations

import pytest

from diffoundry.planning import keys


@pytest.fixture(autouse=True)
def _fresh_caches():
    for function in (keys.imported_modules, keys.source_hash, keys.tool_version):
        function.cache_clear()
    yield
    for function in (keys.imported_modules, keys.source_hash, keys.tool_version):
        function.cache_clear()


def key(**changes):
    values = {
        "stage": "capture",
        "module": "diffoundry.formats.canonical",
        "options": {"steps": 4},
        "inputs": {"unet": "sha256:aa"},
        "contracts": {},
        "tools": ("numpy",),
    }
    return keys.stage_key(**{**values, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"steps": 5}},
        {"inputs": {"unet": "sha256:bb"}},
        {"contracts": {"unet": 1}},
        {"tools": ("numpy", "pydantic")},
        {"bound_to": "avx512"},
        {"stage": "other"},
    ],
)
def test_each_part_changes_the_key(change):
    assert key() == key()
    assert key(**change) != key()


def test_a_changed_helper_of_a_helper_changes_the_key(monkeypatch, tmp_path):
    before = key()
    assert "diffoundry.errors" in keys.imported_modules("diffoundry.formats.canonical")
    changed = tmp_path / "errors.py"
    changed.write_text(keys.module_file("diffoundry.errors").read_text() + "\n# changed\n")
    original = keys.module_file
    monkeypatch.setattr(
        keys, "module_file", lambda name: changed if name == "diffoundry.errors" else original(name)
    )
    keys.source_hash.cache_clear()
    assert key() != before


def test_imports_inside_functions_count():
    assert "diffoundry.artifacts.store" in keys.imported_modules("diffoundry.cli.build")
    assert "diffoundry.cli.build" in keys.imported_modules("diffoundry.cli.main")


def test_a_new_tool_version_changes_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(keys, "tool_version", lambda name: "999")
    assert key() != before
