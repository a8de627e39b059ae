"""A `tensorrt_build` is whole, its specification fits its graph, and equal ones are equal bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import tensorrt_build
from diffoundry.formats.tensorrt_build import Range, profiles_of
from diffoundry.types import ShapePolicy
from tests.compilers.small_network import CONTRACT
from tests.runtimes.tensorrt.doubling import doubling_build


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / tensorrt_build.SPEC_FILE
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_a_build_reads_back_and_validates(tmp_path: Path) -> None:
    artifact = doubling_build(tmp_path / "a", workspace_bytes=5, cuda_graph=True)
    tensorrt_build.validate(artifact.path)
    spec = tensorrt_build.read_spec(artifact.path)
    assert (spec.workspace_bytes, spec.cuda_graph, spec.typing) == (5, True, "strong")
    assert spec.profiles[1]["x"] == Range((1, 3), (1, 4), (4, 8))


def test_equal_builds_have_equal_bytes(tmp_path: Path) -> None:
    first, second = doubling_build(tmp_path / "a"), doubling_build(tmp_path / "b")
    edit(second.path, lambda document: document)  # another order of bytes, the same contents
    assert tensorrt_build.digest(first.path) != tensorrt_build.digest(second.path)
    for artifact in (first, second):
        tensorrt_build.canonicalise(artifact.path)
    assert tensorrt_build.digest(first.path) == tensorrt_build.digest(second.path)
    assert tensorrt_build.size_bytes(first.path) > 100


def test_a_dynamic_policy_makes_one_profile_over_the_axes() -> None:
    (profile,) = profiles_of(CONTRACT, ShapePolicy())
    assert profile["sample"] == Range((1, 4, 2, 2), (1, 4, 4, 4), (4, 4, 16, 16))
    assert profile["context"] == Range((1, 5, 8), (1, 5, 8), (4, 5, 8))


def test_other_policies_make_one_profile_a_shape_and_none_twice() -> None:
    shapes = tuple(
        (("batch", 1), ("height", height), ("width", width))
        for height, width in ((16, 16), (64, 16), (16, 16))
    )
    found = profiles_of(CONTRACT, ShapePolicy("enumerated", shapes))
    assert [profile["sample"].opt for profile in found] == [(1, 4, 4, 4), (1, 4, 16, 4)]
    assert all(one.min == one.opt == one.max for profile in found for one in profile.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(schema="diffoundry.tensorrt-build/2.0"), "build specification"),
        (lambda d: d.pop("profiles"), "build specification"),
        (lambda d: d.update(profiles=[]), "at least one optimization profile"),
        (lambda d: d.update(profiles=[{"z": d["profiles"][0]["x"]}]), "the graph has x"),
        (lambda d: d["profiles"][1]["x"].update(min=[2, 9]), "does not hold"),
        (lambda d: d["profiles"][1]["x"].update(min=[1]), "number of dimensions"),
        (lambda d: d.update(onnx_digest="sha256:0"), "sha256:0"),
    ],
)
def test_a_specification_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    artifact = doubling_build(tmp_path / "a")
    edit(artifact.path, change)
    with pytest.raises(ArtifactError, match=said):
        tensorrt_build.validate(artifact.path)


@pytest.mark.parametrize("damage", ["truncated", "gone", "foreign", "no specification"])
def test_a_damaged_build_is_refused(tmp_path: Path, damage: str) -> None:
    folder = doubling_build(tmp_path / "a").path
    model = folder / "onnx" / "model.onnx"
    if damage == "truncated":
        model.write_bytes(model.read_bytes()[:-30])
    elif damage == "gone":
        model.unlink()
    elif damage == "foreign":
        other = doubling_build(tmp_path / "b").path / "onnx" / "model.onnx"
        model.write_bytes(other.read_bytes() + b"\x42\x00")
    else:
        (folder / tensorrt_build.SPEC_FILE).write_text("{")
    with pytest.raises(ArtifactError):
        tensorrt_build.validate(folder)
