"""The onnx format: damage is named, two exports are byte-equal, values can be made outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx as onnx_package
import pytest

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.formats import onnx
from tests.compilers.small_network import copied, shared_onnx

EXPORT = """
import sys
from pathlib import Path
from diffoundry.exporters.onnx_from_exported_program import OnnxFromExportedProgram
from tests.compilers import small_network as small
folder = Path(sys.argv[1])
stage = OnnxFromExportedProgram(external_data_threshold_bytes=int(sys.argv[2]))
small.make_onnx(folder, small.make_program(folder), stage)
"""


def test_two_exports_in_two_processes_are_byte_equal(tmp_path: Path) -> None:
    """In folders of different names; the second with another hash seed."""
    folders = [tmp_path / "one", tmp_path / "another folder"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", EXPORT, str(folder), "1000000"],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for folder, seed in zip(folders, ("1", "2"), strict=True)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    files = [(folder / "onnx/model/model.onnx").read_bytes() for folder in folders]
    assert files[0] == files[1]
    facts = [(folder / "program/program.json").read_bytes() for folder in folders]
    assert facts[0] == facts[1]
    for place in (str(tmp_path), sys.prefix, str(Path(__file__).parents[3]), "site-packages"):
        assert place.encode() not in files[0]


def test_canonicalising_twice_changes_nothing(tmp_path: Path) -> None:
    for artifact in (shared_onnx(), shared_onnx(external=True), shared_onnx("fp16")):
        model = copied(artifact, tmp_path / f"{artifact.type.precision}{id(artifact)}")
        before = onnx.digest(model.path)
        onnx.canonicalise(model.path)
        assert onnx.digest(model.path) == before


def test_nodes_are_named_after_their_modules() -> None:
    names = [node.name for node in onnx.read_model(shared_onnx().path).graph.node]
    assert "/block/conv/Conv" in names
    assert "/conv_out/Conv" in names
    assert len(set(names)) == len(names)


def test_metadata_of_the_exporter_is_gone() -> None:
    model = onnx.read_model(shared_onnx().path)
    assert model.producer_name == "diffoundry"
    assert not model.metadata_props and not model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    names = [tensor.name for tensor in model.graph.initializer]
    assert names == sorted(names)


def test_external_data_is_relaid_in_order_and_aligned() -> None:
    artifact = shared_onnx(external=True)
    tensors = onnx.external_tensors(onnx.read_model(artifact.path))
    assert tensors
    offsets = []
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == onnx.DATA_FILE
        offsets.append(int(entries["offset"]))
    assert offsets == sorted(offsets) and not any(offset % 64 for offset in offsets)
    assert {path.name for path in artifact.path.iterdir()} == {onnx.MODEL_FILE, onnx.DATA_FILE}


def test_weights_that_lie_right_are_not_copied_again(tmp_path: Path) -> None:
    model = copied(shared_onnx(external=True), tmp_path)
    data = model.path / onnx.DATA_FILE
    before = data.stat()
    onnx.canonicalise(model.path)
    assert data.stat().st_ino == before.st_ino and data.stat().st_mtime_ns == before.st_mtime_ns
    data.write_bytes(data.read_bytes() + b"more")
    digest = onnx.digest(shared_onnx(external=True).path)
    onnx.canonicalise(model.path)
    assert data.stat().st_size == before.st_size and onnx.digest(model.path) == digest


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_truncated_model_is_refused(tmp_path: Path, keep: float) -> None:
    model = copied(shared_onnx(), tmp_path)
    file = model.path / onnx.MODEL_FILE
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        onnx.validate(model.path)


@pytest.mark.parametrize("data", [b"not a model at all", b"\x80\x02}q\x00.", b"{}\n" * 50])
def test_another_kind_of_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / onnx.MODEL_FILE).write_bytes(data)
    with pytest.raises(ArtifactError, match="an ONNX model"):
        onnx.validate(tmp_path)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        onnx.validate(tmp_path)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    model = copied(shared_onnx(external=True), tmp_path)
    (model.path / onnx.DATA_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data"):
        onnx.validate(model.path)


def test_short_external_data_is_named(tmp_path: Path) -> None:
    model = copied(shared_onnx(external=True), tmp_path)
    data = model.path / onnx.DATA_FILE
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="at least"):
        onnx.validate(model.path)


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd", "a/../../outside.data"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    model = copied(shared_onnx(external=True), tmp_path)
    (tmp_path / "outside.data").write_bytes((model.path / onnx.DATA_FILE).read_bytes())
    _point_weights_at(model.path, location)
    with pytest.raises(ArtifactError, match="stays inside"):
        onnx.validate(model.path)


def test_external_data_through_a_link_is_refused(tmp_path: Path) -> None:
    model = copied(shared_onnx(external=True), tmp_path)
    data = model.path / onnx.DATA_FILE
    data.rename(tmp_path / "outside.data")
    data.symlink_to(tmp_path / "outside.data")
    with pytest.raises(ArtifactError, match="through no link"):
        onnx.validate(model.path)


def test_a_graph_that_does_not_hang_together_is_refused(tmp_path: Path) -> None:
    model = copied(shared_onnx(), tmp_path)
    proto = onnx.read_model(model.path)
    del proto.graph.node[3]
    onnx.write_model(proto, model.path)
    with pytest.raises(ArtifactError, match=r"onnx\.checker"):
        onnx.validate(model.path)


def test_outputs_can_be_chosen_in_execution_order() -> None:
    model = onnx.read_model(shared_onnx().path)
    chosen = onnx.with_outputs(model)
    assert [value.name for value in chosen.graph.output] == onnx.value_names(model)
    two = onnx.with_outputs(model, ["model_output", "/block/conv/Conv"])
    assert [value.name for value in two.graph.output] == ["/block/conv/Conv", "model_output"]
    assert [value.name for value in model.graph.output] == ["model_output"]


def test_an_unknown_value_is_refused_with_the_nearest_names() -> None:
    model = onnx.read_model(shared_onnx().path)
    with pytest.raises(ContractError, match="/block/conv/Conv"):
        onnx.with_outputs(model, ["/block/conv/Comv"])


def test_precision_is_read_back(tmp_path: Path) -> None:
    document = onnx.read_precision(shared_onnx("fp16").path)
    assert document is not None
    assert {entry["reason"] for entry in document["stays_fp32"]} >= {"phase"}
    assert onnx.read_precision(shared_onnx().path) is None


def test_a_damaged_precision_file_is_refused(tmp_path: Path) -> None:
    model = copied(shared_onnx("fp16"), tmp_path)
    (model.path / onnx.PRECISION_FILE).write_text(json.dumps([1]))
    with pytest.raises(ArtifactError, match="stays_fp32"):
        onnx.validate(model.path)


def _point_weights_at(folder: Path, location: str) -> None:
    model = onnx.read_model(folder)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx_package.TensorProto.EXTERNAL:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
    onnx.write_model(model, folder)
