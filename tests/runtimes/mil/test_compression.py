"""Compressed weights and quantization, against definitions and coremltools' own passes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffoundry.runtimes.mil import program as mil_program
from diffoundry.runtimes.mil.execute import Interpreter
from diffoundry.runtimes.mil.program import Function
from diffoundry.types import Array
from tests.runtimes.mil.mil_cases import Case, build_programs, check_case, rand, save

X = rand(2, 3, 4)
BYTES = np.arange(-12, 12, dtype=np.int8).reshape(2, 3, 4)
SCALES = np.array([0.1, 0.2, 0.4], np.float32)
ZEROS = np.array([-3, 0, 7], np.int8)
TIES = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 300.0, -300.0, 0.4], np.float32)
COLUMN = (slice(None), None)
INDICES = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
LUT = np.array([1.0, 5.0, 9.0, 13.0, 2.0, 10.0, 18.0, 26.0], np.float16).reshape(2, 1, 4, 1)
VECTORS = np.array([[1.0, 2.0, 3.0], [7.0, 8.0, 9.0]], np.float32).reshape(1, 1, 1, 2, 3)
BITS = np.array([0, 0, 1, 0, 1, 1, 0, 0], np.uint8).reshape(2, 2, 2)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], np.uint8)
NONZERO = np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8)
PER_COLUMN = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)


def small(values: Array, kind: str) -> Array:
    """Integers of fewer than eight bits, as coremltools marks them."""
    from coremltools.converters.mil.mil import types

    return values.astype(types.nptype_from_builtin(types.string_to_builtin(kind)))


def dense(mask: Array, values: Array) -> Array:
    found = np.zeros(mask.shape, values.dtype)
    found[mask != 0] = values
    return found


CASES = {
    "quantize": Case(
        "quantize", {"input": X},
        {"scale": np.float32(0.02), "zero_point": np.int8(5), "output_dtype": "int8"},
        (np.clip(np.round(X / np.float32(0.02)) + 5, -128, 127)).astype(np.int8)),
    "quantize rounds half to even and saturates": Case(
        "quantize", {"input": TIES},
        {"scale": np.float32(1), "zero_point": np.uint8(10), "output_dtype": "uint8"},
        np.array([8, 10, 10, 12, 12, 255, 0, 10], np.uint8)),
    "quantize per channel": Case(
        "quantize", {"input": X}, {"scale": SCALES, "axis": -2, "output_dtype": "int8",
                                   "zero_point": ZEROS}),
    "dequantize": Case("dequantize", {"input": BYTES}, {"scale": np.float32(0.3)},
                       BYTES * np.float32(0.3)),
    "dequantize per channel": Case(
        "dequantize", {"input": BYTES}, {"scale": SCALES, "zero_point": ZEROS, "axis": 1},
        (BYTES.astype(np.float32) - ZEROS[COLUMN]) * SCALES[COLUMN]),
    "affine": Case(
        "constexpr_affine_dequantize", {},
        {"quantized_data": BYTES, "zero_point": ZEROS, "scale": SCALES, "axis": 1},
        (BYTES.astype(np.float32) - ZEROS[COLUMN]) * SCALES[COLUMN], "iOS16"),
    "affine with one scale": Case(
        "constexpr_affine_dequantize", {},
        {"quantized_data": BYTES, "zero_point": np.int8(2), "scale": np.float16(0.3), "axis": 0},
        ((BYTES.astype(np.float32) - 2) * np.float32(np.float16(0.3))).astype(np.float16),
        "iOS17"),
    "cast": Case("constexpr_cast", {}, {"source_val": X.astype(np.float16),
                                        "output_dtype": "fp32"},
                 X.astype(np.float16).astype(np.float32), "iOS16"),
    # The documentation's example: two-bit indices, the first in the lowest bits.
    "table before iOS 18": Case(
        "constexpr_lut_to_dense", {},
        {"indices": np.array([0b01101100, 0b11], np.uint8), "shape": np.array([5], np.uint32),
         "lut": np.array([10.0, 11.0, 12.0, 13.0], np.float32)},
        np.array([10.0, 13.0, 12.0, 11.0, 13.0], np.float32), "iOS16"),
    "table of six bits before iOS 18": Case(
        "constexpr_lut_to_dense", {},
        {"indices": np.array([0b01000001, 0b00100000, 0b00001100], np.uint8),
         "shape": np.array([2, 2], np.uint32), "lut": np.arange(64, dtype=np.float16)},
        np.array([[1.0, 1.0], [2.0, 3.0]], np.float16), "iOS17"),
    "tables in groups": Case(
        "constexpr_lut_to_dense", {}, {"indices": small(INDICES, "uint2"), "lut": LUT},
        np.array([9, 13, 13, 1, 5, 1, 26, 2, 18, 10, 2, 26], np.float16).reshape(6, 2), "iOS18"),
    **{
        f"table of vectors along {axis}": Case(
            "constexpr_lut_to_dense", {},
            {"indices": small(BITS, "uint1"), "lut": VECTORS, "vector_axis": np.int32(axis)},
            np.moveaxis(np.moveaxis(VECTORS.reshape(2, 3)[BITS], axis, -2).reshape(
                *np.moveaxis(BITS, axis, -1).shape[:-1], 6), -1, axis), "iOS18")
        for axis in (1, 2)
    },
    "sparse before iOS 18": Case(
        "constexpr_sparse_to_dense", {},
        {"nonzero_data": np.array([3.0, 5.0], np.float32), "mask": np.array([0b01100], np.uint8),
         "shape": np.array([5], np.uint32)}, np.array([0, 0, 3, 5, 0], np.float32), "iOS16"),
    "sparse": Case("constexpr_sparse_to_dense", {}, {"nonzero_data": NONZERO,
                                                     "mask": small(MASK, "uint1")},
                   dense(MASK, NONZERO), "iOS18"),
    "blocks": Case(
        "constexpr_blockwise_shift_scale", {},
        {"data": small(BYTES.reshape(6, 4) % 8 - 8, "int4"), "scale": 1 + np.abs(rand(3, 2)),
         "offset": small(np.arange(-3, 3).reshape(3, 2), "int4")},
        lambda data, scale, offset: (data.astype(np.float32) - np.kron(offset, np.ones((2, 2))))
        * np.kron(scale, np.ones((2, 2))), "iOS18"),
    "blocks without offset": Case(
        "constexpr_blockwise_shift_scale", {},
        {"data": small(np.arange(12).reshape(3, 4), "uint4"), "scale": PER_COLUMN},
        np.arange(12).reshape(3, 4) * PER_COLUMN, "iOS18"),
    "sparse blocks": Case(
        "constexpr_sparse_blockwise_shift_scale", {},
        {"data_mask": small(MASK, "uint1"), "nonzero_data": NONZERO, "scale": PER_COLUMN,
         "offset": np.array([[1, 2, 3, 4]], np.int8)},
        (MASK, ((dense(MASK, NONZERO) - np.array([1, 2, 3, 4])) * PER_COLUMN)[MASK != 0].astype(
            np.float32)), "iOS18"),
    "sparse table": Case(
        "constexpr_lut_to_sparse", {},
        {"indices_mask": small(MASK, "uint1"), "vector_axis": np.int32(0),
         "indices_nonzero_data": small(np.array([0, 1, 1, 0, 1, 1, 0, 0, 1]), "uint1"),
         "lut": np.array([[2.0, 2.5], [3.0, 3.5]], np.float32).reshape(1, 1, 2, 2)},
        (MASK.repeat(2, 0), np.array([2, 3, 2.5, 3.5, 3, 2, 3, 3.5, 2.5, 3.5, 3, 2, 3.5, 2.5, 2, 3,
                                      2.5, 3.5], np.float32)), "iOS18"),
}  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    return build_programs(CASES, tmp_path_factory.mktemp("compression"))


@pytest.mark.parametrize("name", CASES)
def test_compressed_values_follow_their_definition(
    name: str, programs: dict[str, Function]
) -> None:
    check_case(CASES[name], programs[name])


WEIGHT = rand(32, 16, 3, 3)


def _config(kind: str) -> tuple[Any, Any]:
    """coremltools' function and its options."""
    import coremltools.optimize.coreml as cto

    options: dict[str, tuple[Any, Any]] = {
        "int8": (cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(weight_threshold=0)),
        "int4 in blocks": (
            cto.linear_quantize_weights,
            cto.OpLinearQuantizerConfig(
                dtype="int4", granularity="per_block", block_size=8, weight_threshold=0
            ),
        ),
        "6 bit": (cto.palettize_weights, _palette(cto, nbits=6)),
        "4 bit in groups": (
            cto.palettize_weights,
            _palette(cto, nbits=4, granularity="per_grouped_channel", group_size=8),
        ),
        "sparse": (
            cto.prune_weights,
            cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0),
        ),
    }
    function, op_config = options[kind]
    return function, cto.OptimizationConfig(global_config=op_config)


def _palette(cto: Any, **options: Any) -> Any:
    return cto.OpPalettizerConfig(mode="uniform", weight_threshold=0, **options)


def _conv_package(path: Path, opset: str) -> Path:
    def emit() -> Any:
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil.block import curr_block

        x = curr_block().inputs["x"]
        return Builder.conv(x=x, weight=WEIGHT, bias=rand(32), name="y")

    return save(emit, {"x": rand(1, 16, 5, 5)}, path, opset, keep_passes=True)


@pytest.mark.parametrize(
    ("kind", "opset"),
    [("int8", "iOS16"), ("int8", "iOS18"), ("int4 in blocks", "iOS18"), ("6 bit", "iOS16"),
     ("4 bit in groups", "iOS18"), ("sparse", "iOS17"), ("sparse", "iOS18")],
)  # fmt: skip
def test_what_coremltools_compresses_runs_like_its_own_decompression(
    kind: str, opset: str, tmp_path: Path
) -> None:
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = _conv_package(tmp_path / "plain.mlpackage", opset)
        compress, config = _config(kind)
        model = compress(ct.models.MLModel(str(plain), skip_model_load=True), config)
        model.save(str(tmp_path / "compressed.mlpackage"))
        cto.decompress_weights(model).save(str(tmp_path / "back.mlpackage"))
    compressed, decompressed = (
        mil_program.load(tmp_path / f"{name}.mlpackage") for name in ("compressed", "back")
    )
    kinds = {op.kind for op in compressed.functions[0].operations}
    assert any(name.startswith("constexpr_") for name in kinds), kinds
    assert not any(op.kind.startswith("constexpr_") for op in decompressed.functions[0].operations)
    feeds = {"x": torch.from_numpy(rand(1, 16, 5, 5))}
    found, wanted = (
        Interpreter(p.functions[0], "test").run(feeds, ["y"], 1)["y"].numpy()
        for p in (compressed, decompressed)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    exact = torch.nn.functional.conv2d(feeds["x"], torch.from_numpy(WEIGHT)).numpy()
    assert np.abs(found - exact).mean() > 1e-4
