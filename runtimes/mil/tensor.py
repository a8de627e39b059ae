"""Shapes and order: reshape, transpose, concat, split, pad, tile, and tensors made from shapes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffoundry.runtimes.mil.registry import Ints, operation

Tensors = tuple[Tensor, ...]


@operation(moves_data=True)
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """0 keeps the dimension of x, counted from the right; -1 takes what is left."""
    rank, given = x.dim(), len(shape)
    sizes = list(shape)
    for i, size in enumerate(shape):
        if size == 0:
            sizes[i] = x.shape[rank - given + i] if rank - given + i >= 0 else 1
    return x.reshape(sizes)


@operation(moves_data=True)
def reshape_like(
    x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors
) -> Tensor:
    sizes: list[int] = []
    for ref, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += ref.shape[int(begin) : None if bool(to_end) else int(end)]
    return x.reshape(sizes)


@operation(moves_data=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operation(moves_data=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operation(moves_data=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


@operation(moves_data=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


@operation(moves_data=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """A scalar among the values counts as one element (sizes put together to a shape)."""
    values = tuple(value.reshape(1) if value.dim() == 0 else value for value in values)
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@operation(moves_data=True)
def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


@operation(moves_data=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> Tensors:
    size = x.shape[axis]
    if split_sizes is None:
        if not num_splits or size % num_splits:
            raise ValueError(f"{size} elements do not split into {num_splits} equal parts")
        split_sizes = (size // num_splits,) * num_splits
    return torch.split(x, list(split_sizes), axis)


@operation(moves_data=True)
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """`pad` holds (before, after) for the last dimensions, the outermost first."""
    pairs = [(0, 0)] * (x.dim() - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs):
        size = x.shape[axis]
        places = torch.arange(-before, size + after)
        if mode == "reflect":
            places = (size - 1) - ((size - 1) - places.abs()).abs()
        elif mode != "replicate":
            raise ValueError(f"unknown mode {mode!r}")
        x = x.index_select(axis, places.clamp(0, size - 1))
    return x


@operation(moves_data=True)
def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.tile(reps)


@operation(moves_data=True)
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(tuple(range(x.dim())) if axes is None else axes)


@operation(moves_data=True)
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operation(moves_data=True)
def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.reshape(()).expand(shape)


@operation(moves_data=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(tuple(ref_tensor.shape), value)


@operation()
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item())


@operation(moves_data=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    keep = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    return torch.where(keep, x, torch.zeros_like(x))


@operation(moves_data=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    axis %= indices.dim() + 1
    places = torch.arange(one_hot_vector_size).reshape(-1, *[1] * (indices.dim() - axis))
    on = torch.tensor(1) if on_value is None else on_value
    off = torch.tensor(0) if off_value is None else off_value
    return torch.where(indices.unsqueeze(axis) == places, on, off)


@operation(moves_data=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channel (a × block + b) × C + c goes to row offset a, column offset b of channel c."""
    n, channels, height, width = x.shape
    parts = x.reshape(n, block_size, block_size, channels // block_size**2, height, width)
    found = parts.permute(0, 3, 4, 1, 5, 2)
    return found.reshape(n, -1, height * block_size, width * block_size)


@operation(moves_data=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, channels, height, width = x.shape
    parts = x.reshape(
        n, channels, height // block_size, block_size, width // block_size, block_size
    )
    found = parts.permute(0, 3, 5, 1, 2, 4)
    return found.reshape(n, -1, height // block_size, width // block_size)


@operation(moves_data=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@operation(moves_data=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@operation(moves_data=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis %= x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)
