"""Reading packages: constants as they lie in the file, edges, and damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.errors import ArtifactError
from diffoundry.runtimes.mil import program as mil_program
from diffoundry.runtimes.mil.program import Edge
from diffoundry.runtimes.mil.weights import TensorType, decode, unpack
from tests.runtimes.mil.mil_cases import rand, save

WEIGHT, BIAS = rand(16, 24), rand(16)
DATA = Path("Data/com.apple.CoreML")


def emit() -> Any:
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil.block import curr_block

    y = Builder.linear(x=curr_block().inputs["x"], weight=WEIGHT, bias=BIAS, name="y")
    return Builder.softmax(x=y, axis=1, name="z")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(emit, {"x": rand(2, 24)}, tmp_path_factory.mktemp("program") / "a.mlpackage")


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))


def test_a_package_is_read_as_it_was_written(package: Path) -> None:
    (function,) = mil_program.load(package).functions
    assert function.name == "main" and function.opset == "CoreML7"
    assert function.inputs == (("x", TensorType("fp32", (2, 24))),)
    assert [op.kind for op in function.operations] == ["linear", "softmax"]
    weight = function.constants[str(function.operations[0].arguments["weight"][0])].value()
    np.testing.assert_array_equal(weight, WEIGHT)
    axis = function.constants[str(function.operations[1].arguments["axis"][0])].value()
    assert axis.shape == () and int(axis) == 1


def test_weights_are_views_of_the_file(package: Path) -> None:
    (function,) = mil_program.load(package).functions
    constant = next(c for c in function.constants.values() if c.type.shape == (16, 24))
    weight = constant.value()
    assert constant.blob is not None and weight.base is not None and not weight.flags.owndata
    assert np.shares_memory(weight, constant.value())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_integers_come_back(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, 37).astype(np.uint8)
    each = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :bits]
    np.testing.assert_array_equal(
        unpack(np.packbits(each.ravel(), bitorder="little"), bits, 37), values
    )


def test_signed_packed_integers_keep_their_sign() -> None:
    assert decode(bytes([0x8F, 0x07]), "int4", (3,)).tolist() == [-1, -8, 7]


def test_edges_allow_listed_shapes_or_ranges() -> None:
    assert Edge("x", shapes=((1, 4),)).allows((1, 4))
    assert not Edge("x", shapes=((1, 4),)).allows((1, 5))
    ranged = Edge("x", ranges=((1, 1), (4, 8), (2, None)))
    assert ranged.allows((1, 8, 500))
    assert not ranged.allows((1, 9, 2)) and not ranged.allows((1, 8))
    assert str(ranged) == "x: [1..1, 4..8, 2..]"


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _manifest_outside(copy: Path) -> None:
    file = copy / "Manifest.json"
    text = file.read_text().replace("com.apple.CoreML/model.mlmodel", "../../model.mlmodel")
    file.write_text(text)


def _other_weights(copy: Path) -> None:
    other = save(_emit_other, {"x": rand(2, 24)}, copy.parent / "other.mlpackage")
    place = DATA / "weights" / "weight.bin"
    shutil.copyfile(other / place, copy / place)


def _emit_other() -> Any:
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil.block import curr_block

    return Builder.linear(x=curr_block().inputs["x"], weight=rand(9, 24), bias=rand(9), name="y")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda copy: (copy / "Manifest.json").unlink(), "mlpackage"),
        (lambda copy: (copy / "Manifest.json").write_text("{"), "manifest"),
        (_manifest_outside, "inside"),
        (lambda copy: _cut(copy / DATA / "model.mlmodel", 200), "model.mlmodel"),
        (lambda copy: _cut(copy / DATA / "model.mlmodel", 0), "ML program"),
        (lambda copy: (copy / DATA / "weights/weight.bin").unlink(), "weights"),
        (lambda copy: _cut(copy / DATA / "weights/weight.bin", 600), "600 bytes"),
        (_other_weights, "another model"),
    ],
)
def test_a_damaged_package_is_refused(damage: Any, words: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ArtifactError, match=words):
        mil_program.load(copy)
