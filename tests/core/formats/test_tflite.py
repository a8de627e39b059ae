"""The tflite format: what is read from a file, and the damage that is noticed before it opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import tflite
from tests.exporters import tiny_tflite as tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.copied(tmp_path).path


def test_a_whole_model_is_valid_and_canonical(model: Path) -> None:
    before = tflite.digest(model)
    tflite.canonicalise(model)
    tflite.validate(model)
    assert tflite.digest(model) == before
    assert tflite.size_bytes(model) == sum(file.stat().st_size for file in model.iterdir())


def test_the_file_alone_is_valid_too(model: Path) -> None:
    tflite.validate(tflite.model_file(model))


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.5, 0.9, 0.9999])
def test_a_truncated_model_is_refused(model: Path, share: float) -> None:
    file = tflite.model_file(model)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match=r"model\.tflite"):
        tflite.validate(model)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_noticed_without_its_facts(model: Path, share: float) -> None:
    file = tflite.model_file(model)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        tflite.validate(file)


def test_another_kind_of_file_is_refused(model: Path) -> None:
    tflite.model_file(model).write_bytes(b"PK\3\4 not a model at all")
    with pytest.raises(ArtifactError, match="do not begin as one"):
        tflite.validate(model)


def test_noise_after_the_head_is_refused(model: Path) -> None:
    file = tflite.model_file(model)
    data = bytearray(file.read_bytes())
    data[0:4] = b"\xf0\xff\xff\x7f"
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        tflite.validate(file)


@pytest.mark.parametrize("index", [99999, -7])
def test_an_operation_on_a_tensor_that_is_not_there_is_refused(model: Path, index: int) -> None:
    from ai_edge_litert import schema_py_generated as schema

    file = tflite.model_file(model)
    data = bytearray(file.read_bytes())
    schema.Model.GetRootAs(data, 0).Subgraphs(1).Operators(3).InputsAsNumpy()[0] = index
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="a tensor that is not there"):
        tflite.validate(file)


def test_weights_outside_the_file_are_refused(model: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    file = tflite.model_file(model)
    data = bytearray(file.read_bytes())
    found = schema.Model.GetRootAs(data, 0)
    largest = max(map(found.Buffers, range(found.BuffersLength())), key=lambda b: b.DataLength())
    length = largest._tab.Vector(largest._tab.Offset(4)) - 4
    data[length : length + 4] = (2**30).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="weights that end at byte"):
        tflite.validate(file)


def test_a_missing_model_and_a_link_are_refused(model: Path, tmp_path: Path) -> None:
    file = tflite.model_file(model)
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="no such file"):
        tflite.validate(model)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="no such file"):
        tflite.validate(model)


def test_facts_about_another_model_are_refused(model: Path) -> None:
    file = model / tflite.FACTS_FILE
    text = file.read_text()
    file.write_text(text.replace("b1_h16_w16", "b1_h64_w64"))
    with pytest.raises(ArtifactError, match="b1_h64_w64"):
        tflite.validate(model)
    file.write_text("{")
    with pytest.raises(ArtifactError, match=r"model\.json"):
        tflite.validate(model)
    file.write_text("{}")
    with pytest.raises(ArtifactError, match=tflite.SCHEMA):
        tflite.validate(model)


def test_weights_are_counted_once_whatever_shares_them() -> None:
    stored = tflite.weight_types(tiny.shared_tflite().path)
    assert set(stored) <= {"float32", "int32"}
    assert "reduced_precision_support" not in tflite.metadata_names(tiny.shared_tflite().path)


def test_operations_stand_in_execution_order() -> None:
    path = tiny.shared_tflite().path
    (_, other) = tflite.read_signatures(path)
    found = tflite.operations(path, other.subgraph)
    assert len({index for index, _ in found}) == len(found)
    first = next(i for i, (_, name) in enumerate(found) if name.startswith("conv_in"))
    last = max(i for i, (_, name) in enumerate(found) if "conv_out" in name)
    assert first < last
