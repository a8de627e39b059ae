"""Compressed weights (constexpr_*), and quantization of values.

Integers of fewer than eight bits arrive unpacked as int8 or uint8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffoundry.runtimes.mil.registry import Ints, operation
from diffoundry.runtimes.mil.weights import unpack

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@operation()
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round half to even(input / scale) + zero point)."""
    found = torch.round(input / _along(scale, input, axis))
    found = found if zero_point is None else found + _along(zero_point, input, axis).float()
    return found.clamp(*_RANGES[output_dtype])


@operation()
def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    found = input.float()
    found = found if zero_point is None else found - _along(zero_point, input, axis).float()
    return _along(scale, input, axis) * found


@operation()
def constexpr_affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    return dequantize(quantized_data, scale, zero_point, axis)


@operation()
def constexpr_blockwise_shift_scale(
    data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    """scale × (data − offset), each standing for a block of data."""
    found = data.float()
    found = found if offset is None else found - _spread(offset, data.shape).float()
    return _spread(scale, data.shape) * found


@operation()
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val


@operation()
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: int | None = None, shape: Ints | None = None
) -> Tensor:
    """Before iOS 18 the indices are packed bytes of `shape`, and there is one table."""
    if shape is None:
        return _look_up(indices, lut, vector_axis)
    bits = int(math.log2(lut.numel()))
    return lut[_unpacked(indices, bits, shape).long()]


@operation()
def constexpr_sparse_to_dense(
    nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None
) -> Tensor:
    """Before iOS 18 the mask is packed bits of `shape`."""
    return _dense(nonzero_data, mask if shape is None else _unpacked(mask, 1, shape))


@operation()
def constexpr_lut_to_sparse(
    indices_mask: Tensor,
    indices_nonzero_data: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    mask, size = indices_mask, lut.shape[-1]
    found = _look_up(_dense(indices_nonzero_data, mask), lut, vector_axis)
    if size > 1 and vector_axis is not None:
        mask = mask.repeat_interleave(size, vector_axis)
    return mask, found[mask.bool()]


@operation()
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = constexpr_blockwise_shift_scale(_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


def _along(vector: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A vector shaped to lie along `axis` of x; a scalar as it is."""
    if vector.dim() == 0 or axis is None:
        return vector
    return vector.reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def _spread(blocks: Tensor, shape: Ints) -> Tensor:
    """Each element repeated over its block, so that the result broadcasts to `shape`."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] > 1:
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


def _dense(values: Tensor, mask: Tensor) -> Tensor:
    found = torch.zeros(mask.shape, dtype=values.dtype)
    found[mask.bool()] = values
    return found


def _unpacked(packed: Tensor, bits: int, shape: Ints) -> Tensor:
    return torch.from_numpy(unpack(packed.numpy(), bits, math.prod(shape))).reshape(shape)


def _look_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """lut [groups of each axis…, palette, vector]: an index stands for a vector along an axis."""
    tables = lut.reshape(-1, *lut.shape[-2:])
    numbers = torch.arange(len(tables)).reshape(lut.shape[:-2])
    found = tables[_spread(numbers, indices.shape), indices.long()]
    if lut.shape[-1] == 1 or vector_axis is None:
        return found.squeeze(-1)
    axis = vector_axis % indices.dim()
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)
