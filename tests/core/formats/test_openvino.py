"""The openvino format: equal bytes for equal models, damage, foreign weights, probing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.formats import openvino
from diffoundry.types import Artifact
from tests.compilers import small_network as small
from tests.exporters.small_openvino import ONE_SHAPE, convert, shared_openvino, with_weight


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return small.copied(shared_openvino(), tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_conversions_have_equal_bytes(tmp_path: Path, precision: str) -> None:
    # The converter counts layers over the whole process: the second starts at another number.
    first = shared_openvino(precision)
    shared_openvino("fp32", ONE_SHAPE)
    second = convert(tmp_path, small.shared_onnx(), precision=precision)
    for name in (openvino.MODEL_FILE, openvino.WEIGHTS_FILE):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    assert first.digest == second.digest


def test_canonicalising_again_changes_nothing(model: Artifact) -> None:
    openvino.canonicalise(model.path)
    assert openvino.digest(model.path) == model.digest


def test_no_version_path_or_counter_is_left(model: Artifact) -> None:
    import openvino as package

    text = openvino.model_file(model.path).read_text()
    assert package.__version__.split("-")[0] not in text
    assert str(Path.home()) not in text and "input_model" not in text
    names = [layer.get("name", "") for layer in openvino.read_graph(model.path).iter("layer")]
    assert len(set(names)) == len(names)
    assert "/conv_in/Conv/Const" in names
    assert not [name for name in names if name.startswith(("Constant_", "Reshape_", "MVN_"))]


def test_the_size_is_that_of_both_files(model: Artifact) -> None:
    files = (openvino.model_file(model.path), openvino.weights_file(model.path))
    assert openvino.size_bytes(model.path) == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_graph_is_refused(model: Artifact, kept: float) -> None:
    file = openvino.model_file(model.path)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ArtifactError, match=r"truncated(.|\n)*build it again"):
        openvino.load(model.path)


@pytest.mark.parametrize("text", ["<html/>", "<net><layers/><edges/></net>"])
def test_other_xml_is_refused(model: Artifact, text: str) -> None:
    openvino.model_file(model.path).write_text(text)
    with pytest.raises(ArtifactError, match="an OpenVINO model"):
        openvino.validate(model.path)


def test_truncated_weights_are_refused_with_the_constant_that_is_cut(model: Artifact) -> None:
    file = openvino.weights_file(model.path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"ends there(.|\n)*bytes"):
        openvino.load(model.path)


def test_weights_of_another_model_are_refused(model: Artifact, tmp_path: Path) -> None:
    """Same network, same sizes: OpenVINO itself would compute with them."""
    other = bytearray(openvino.weights_file(model.path).read_bytes())
    other[100:104] = b"\0\0\0\0"
    openvino.weights_file(model.path).write_bytes(other)
    with pytest.raises(ArtifactError, match="another model"):
        openvino.load(model.path)


@pytest.mark.parametrize("name", [openvino.MODEL_FILE, openvino.WEIGHTS_FILE])
def test_a_missing_or_linked_file_is_refused(model: Artifact, tmp_path: Path, name: str) -> None:
    file = model.path / name
    away = file.rename(tmp_path / "away")
    with pytest.raises(ArtifactError, match="no such file"):
        openvino.validate(model.path)
    file.symlink_to(away)
    with pytest.raises(ArtifactError, match="no such file"):
        openvino.validate(model.path)


@pytest.mark.parametrize("attribute", ['offset="-4"', 'offset="x"'])
def test_a_constant_that_makes_no_sense_is_refused(model: Artifact, attribute: str) -> None:
    file = openvino.model_file(model.path)
    file.write_text(file.read_text().replace('offset="0"', attribute, 1))
    with pytest.raises(ArtifactError, match=r"constant(.|\n)*offset"):
        openvino.validate(model.path)


def test_a_constant_of_another_size_than_its_shape_is_refused(model: Artifact) -> None:
    file = openvino.model_file(model.path)
    file.write_text(file.read_text().replace('shape="8, 4, 3, 3"', 'shape="8, 4, 3, 2"', 1))
    with pytest.raises(ArtifactError, match="fits its shape"):
        openvino.validate(model.path)


def test_an_operation_that_openvino_does_not_know_is_named(model: Artifact) -> None:
    file = openvino.model_file(model.path)
    file.write_text(file.read_text().replace('type="Sin"', 'type="Abacus"'))
    with pytest.raises(ArtifactError, match="Abacus"):
        openvino.load(model.path)


def test_an_unknown_value_is_refused_with_the_nearest(model: Artifact) -> None:
    with pytest.raises(ContractError, match=r"conv_im(.|\n)*/conv_in/Conv"):
        openvino.with_results(openvino.load(model.path), ["/conv_im/Conv"])


def test_other_weights_give_another_graph_file(model: Artifact, tmp_path: Path) -> None:
    """The digest of the weights is part of it, so a graph's bytes name one model."""
    other = with_weight(model, tmp_path / "other", "conv_in.weight", 9)
    files = [openvino.model_file(artifact.path).read_bytes() for artifact in (model, other)]
    assert files[0] != files[1]


def test_importing_openvino_reports_nothing_to_anyone(tmp_path: Path) -> None:
    """Alone, `import openvino` sends an event from a forked process and writes to ~/intel."""
    code = (
        "import sys; from diffoundry.formats.openvino import import_openvino;"
        "print(import_openvino().Core().available_devices);"
        "assert not [n for n in sys.modules if n.startswith('openvino_telemetry.')]"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "CPU" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
