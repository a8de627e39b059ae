"""The mlpackage format: one set of bytes for one program, and damage is an ArtifactError."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.formats import canonical, mil_weights, mlpackage
from tests.exporters import tiny_coreml as tiny

STAGE = CoremlFromExportedProgram(precision="fp16")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a whole artifact, to be damaged."""
    shutil.copytree(tiny.package(STAGE).path, tmp_path / "model")
    return tmp_path / "model"


def weights_of(folder: Path) -> Path:
    return mlpackage.package(folder) / mlpackage.DATA / mlpackage.WEIGHT_FILE


def test_a_whole_package_is_valid_and_named_after_its_component(folder: Path) -> None:
    mlpackage.validate(folder)
    assert mlpackage.package(folder).name == "unet.mlpackage"
    assert mlpackage.package(mlpackage.package(folder)) == mlpackage.package(folder)
    assert mlpackage.size_bytes(folder) == canonical.tree_size_bytes(folder)


def test_canonical_bytes_stay_what_they_are(folder: Path) -> None:
    before = mlpackage.digest(folder)
    mlpackage.canonicalise(folder)
    assert mlpackage.digest(folder) == before


def test_random_ids_dates_and_debug_files_go(folder: Path) -> None:
    before = mlpackage.digest(folder)
    package = mlpackage.package(folder)
    text = (package / mlpackage.MANIFEST).read_text()
    document = json.loads(text)
    for number, key in enumerate(document["itemInfoEntries"]):
        text = text.replace(key, f"random-{number}")
    (package / mlpackage.MANIFEST).write_text(text)
    (package / "executorch_debug_handle_mapping.json").write_text("{}")
    (package / mlpackage.DATA / "com.apple.CoreML" / "notes.txt").write_text("made on my machine")
    spec = mlpackage.read_spec(folder)
    spec.description.metadata.userDefined["com.github.apple.coremltools.conversion_date"] = "today"
    mlpackage.write_spec(spec, folder)
    assert mlpackage.digest(folder) != before
    mlpackage.canonicalise(folder)
    assert mlpackage.digest(folder) == before


def test_no_path_of_this_machine_stands_in_the_package(folder: Path) -> None:
    raw = mlpackage.spec_file(folder).read_bytes()
    for word in (str(Path.cwd()), "site-packages", ".py", "Traceback"):
        assert word.encode() not in raw


def test_a_truncated_specification_is_noticed(folder: Path) -> None:
    file = mlpackage.spec_file(folder)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ArtifactError, match=r"model\.mlmodel"):
        mlpackage.validate(folder)


def test_truncated_weights_are_noticed(folder: Path) -> None:
    file = weights_of(folder)
    for length in (file.stat().st_size - 1, 1000, 3):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ArtifactError, match=r"weight|mlpackage"):
            mlpackage.validate(folder)


def test_missing_weights_are_noticed(folder: Path) -> None:
    weights_of(folder).unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        mlpackage.validate(folder)


def test_the_weights_of_another_architecture_are_noticed(folder: Path) -> None:
    other = tiny.package(dataclasses.replace(STAGE, weights="palette6"))
    shutil.copyfile(weights_of(other.path), weights_of(folder))
    with pytest.raises(ArtifactError, match="another model"):
        mlpackage.validate(folder)


def test_the_weights_of_the_same_network_trained_otherwise_are_noticed(folder: Path) -> None:
    file = weights_of(folder)
    raw = np.frombuffer(file.read_bytes(), np.uint8).copy()
    raw[-400:-200] ^= 1  # the last weight's values: every record still fits
    file.write_bytes(raw.tobytes())
    with pytest.raises(ArtifactError, match="of another model, or damaged"):
        mlpackage.validate(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda package: (package / "Manifest.json").unlink(),
        lambda package: (package / "Manifest.json").write_text("{"),
        lambda package: (package / "Manifest.json").write_text("{}"),
        lambda package: package.rename(package.with_suffix(".zip")),
        lambda package: shutil.copytree(package, package.with_name("second.mlpackage")),
    ],
)
def test_other_damage_is_an_artifact_error(folder: Path, spoil: Callable[[Path], object]) -> None:
    spoil(mlpackage.package(folder))
    with pytest.raises(ArtifactError):
        mlpackage.validate(folder)


def test_a_manifest_cannot_name_a_file_outside_the_package(folder: Path) -> None:
    manifest = mlpackage.package(folder) / mlpackage.MANIFEST
    manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model", "../../model"))
    with pytest.raises(ArtifactError, match="inside the folder"):
        mlpackage.validate(folder)


def test_every_weight_is_found(folder: Path) -> None:
    values = list(mil_weights.blob_values(mlpackage.read_spec(folder).mlProgram))
    names = {value.blobFileValue.fileName for value in values}
    assert len(values) >= 3 and names == {"@model_path/weights/weight.bin"}


def test_a_function_is_found_by_the_shapes_of_its_inputs() -> None:
    one = mlpackage.Edges("one", {"x": (1, 2)})
    two = mlpackage.Edges("two", {"x": (2, 2)})
    assert mlpackage.edges_for((one, two), {"x": (2, 2)}) is two
    assert mlpackage.edges_for((one,), {"x": (9, 9)}) is one
    with pytest.raises(ContractError, match="one function for each shape"):
        mlpackage.edges_for((one, two), {"x": (3, 2)})


def test_pixels_come_back_as_the_component_gives_them() -> None:
    levels = np.array([0, 255, 51], np.uint8)
    wanted = np.array([-1.0, 1.0, -0.6], np.float32)
    found = mlpackage.from_pixels(np.broadcast_to(levels[None, :, None, None], (1, 3, 2, 4)))
    assert found.shape == (1, 3, 2, 4) and np.allclose(found[0, :, 0, 0], wanted)
    picture = np.zeros((2, 4, 4), np.uint8)
    picture[..., :3] = levels
    assert np.allclose(mlpackage.from_pixels(picture), found)
