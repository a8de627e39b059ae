"""manifest.json: versions that read, versions that do not, and what may never stand in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts.manifest import (
    SCHEMA,
    Manifest,
    read_manifest,
    refuse_absolute_paths,
)
from diffoundry.artifacts.schemas import schema_texts
from diffoundry.errors import BundleError
from diffoundry.types import Limits

FIXTURES = Path(__file__).parent / "fixtures"
DOCS = Path(__file__).parents[2] / "docs"


def write(path: Path, **changes: Any) -> Path:
    data = json.loads((FIXTURES / "manifest-1.0.json").read_text())
    path.write_text(json.dumps({**data, **changes}))
    return path


def test_every_released_manifest_still_loads() -> None:
    released = sorted(FIXTURES.glob("manifest-*.json"))
    assert released
    for path in released:
        manifest = read_manifest(path)
        variant = manifest.variant("onnx-cpu-fp32")
        assert variant.engines["vae_decoder"].type.kind == "onnx"
        assert variant.limits["image"] == Limits(psnr_db=50)
        contract = manifest.contracts["vae_decoder"]
        assert contract.inputs[0].shape({"batch": 2, "height": 32, "width": 64}) == (2, 3, 8, 16)
        assert manifest.model.geometry.vae_factor == 4


def test_a_manifest_survives_being_written_and_read(tmp_path: Path) -> None:
    newest = sorted(FIXTURES.glob("manifest-*.json"))[-1]
    manifest = read_manifest(newest)
    assert manifest.schema_ == SCHEMA
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert read_manifest(tmp_path / "manifest.json") == manifest
    assert manifest.to_json() == newest.read_text()


def test_what_an_older_version_could_not_say_is_none() -> None:
    """1.1 brought the power and the compression records of a variant."""
    old = read_manifest(FIXTURES / "manifest-1.0.json").variants[0]
    assert old.power is None and not old.compressed and old.compression == {}
    new = read_manifest(FIXTURES / "manifest-1.1.json").variants[0]
    assert new.power == "low" and new.compressed
    assert new.compression["vae_decoder"].prune[0].endswith("vae_decoder/prune.json")


def test_a_newer_minor_version_is_read_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "m", schema="diffoundry.bundle/1.7", something_new={"a": 1})
    with pytest.warns(UserWarning, match=r"newer schema diffoundry\.bundle/1\.7"):
        manifest = read_manifest(path)
    assert isinstance(manifest, Manifest)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("diffoundry.bundle/2.0", "install --upgrade"),
        ("diffoundry.bundle/0.9", "build the bundle again"),
        ("diffoundry.evidence/1.0", "found: schema 'diffoundry.evidence/1.0'"),
        ("diffoundry.bundle/1", "schema 'diffoundry.bundle/1'"),
        (None, "schema None"),
        ({"a": 1}, "schema {'a': 1}"),
    ],
)
def test_other_versions_and_other_documents_are_refused(
    tmp_path: Path, schema: Any, says: str
) -> None:
    with pytest.raises(BundleError) as caught:
        read_manifest(write(tmp_path / "m", schema=schema))
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(BundleError, match="JSON"):
        read_manifest(tmp_path / "m")


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m", variants=[], golden="none", profile=3)
    with pytest.raises(BundleError) as caught:
        read_manifest(path)
    for word in ("variants", "golden", "profile"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/model",
        "built in /srv/x",
        "~/models/a",
        "C:\\models",
        "D:/models",
        "\\\\server\\share",
        "file:///x",
        "path='/opt/x/y'",
    ],
)
def test_absolute_paths_are_found_in_values_keys_and_lists(text: str) -> None:
    for data in ({"a": text}, {text: 1}, {"a": [{"b": text}]}):
        with pytest.raises(BundleError, match="no absolute path"):
            refuse_absolute_paths(data)


@pytest.mark.parametrize("text", ["height/8", "a / b", "diffoundry.bundle/1.0", "4×/8", "w:h"])
def test_what_only_looks_like_a_path_is_let_by(text: str) -> None:
    refuse_absolute_paths({"a": text})


def test_the_schemas_in_docs_are_current() -> None:
    for name, text in schema_texts().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, (
            "run: python -m diffoundry.artifacts.schemas docs"
        )
