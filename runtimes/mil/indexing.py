"""Slices, gathers and scatters.

From iOS 17 on an index out of range, a negative one too, is undefined in Core ML: it is refused
here, since nothing could be said about the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffoundry.runtimes.mil.registry import Bools, Ints, Opset, operation

_FIRST_WITHOUT_NEGATIVES = 7


@operation(moves_data=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """numpy's slices; a masked begin or end is left out, a squeezed axis keeps `begin` alone."""
    dropped = squeeze_mask or (False,) * x.dim()
    cuts = _cuts(begin, end, stride, begin_mask, end_mask, dropped)
    for axis, cut in enumerate(cuts):
        places = range(x.shape[axis])[cut]
        x = x.narrow(axis, places[0], 1) if dropped[axis] else _take(x, axis, places)
    return x.squeeze([axis for axis, drop in enumerate(dropped) if drop])


@operation(moves_data=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """The places are found by slicing their own numbers."""
    numbers = torch.arange(x.numel()).reshape(x.shape)
    places = slice_by_index(numbers, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    flat = x.flatten().clone()
    flat[places.flatten()] = update.flatten()
    return flat.reshape(x.shape)


@operation(moves_data=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        start = first + x.shape[axis] if first < 0 else first
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


@operation(moves_data=True)
def gather(
    x: Tensor,
    indices: Tensor,
    opset: Opset,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    axis %= x.dim()
    if batch_dims:
        parts = zip(x, indices, strict=True)
        return torch.stack([gather(a, i, opset, axis - 1, batch_dims - 1) for a, i in parts])
    places = _legal(indices, x.shape[axis], opset)
    found = x.index_select(axis, places.flatten())
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operation(moves_data=True)
def gather_along_axis(
    x: Tensor, indices: Tensor, opset: Opset, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    return torch.take_along_dim(x, _legal(indices, x.shape[axis], opset), axis)


@operation(moves_data=True)
def gather_nd(
    x: Tensor,
    indices: Tensor,
    opset: Opset,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    if batch_dims:
        parts = zip(x, indices, strict=True)
        return torch.stack([gather_nd(a, i, opset, batch_dims - 1) for a, i in parts])
    places = enumerate(indices.unbind(-1))
    return x[tuple(_legal(index, x.shape[axis], opset) for axis, index in places)]


@operation()
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    opset: Opset,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    return _scatter(data, gather(_numbers(data), indices, opset, axis), updates, mode)


@operation()
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    opset: Opset,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    return _scatter(data, gather_along_axis(_numbers(data), indices, opset, axis), updates, mode)


@operation()
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    opset: Opset,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    return _scatter(data, gather_nd(_numbers(data), indices, opset), updates, mode)


@operation(moves_data=True)
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


def _cuts(
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    dropped: Bools,
) -> list[slice]:
    cuts = []
    for i, drop in enumerate(dropped):
        first = None if begin_mask and begin_mask[i] else begin[i]
        last = None if drop or (end_mask and end_mask[i]) else end[i]
        cuts.append(slice(first, last, 1 if drop or not stride else stride[i]))
    return cuts


def _take(x: Tensor, axis: int, places: range) -> Tensor:
    """The elements at `places` along `axis`: a view, unless they run backwards."""
    if places.step < 0:
        return x.index_select(axis, torch.tensor(list(places), dtype=torch.long))
    cut = slice(places.start, places.stop, places.step)
    return x[(slice(None),) * axis + (cut,)]


def _legal(indices: Tensor, size: int, opset: int) -> Tensor:
    """Indices as int64, none negative. Raises IndexError for one out of range."""
    lowest = 0 if opset >= _FIRST_WITHOUT_NEGATIVES else -size
    places = indices.long()
    if places.numel() and (places.min() < lowest or places.max() >= size):
        raise IndexError(
            f"indices {int(places.min())}..{int(places.max())} where {lowest}..{size - 1} are "
            "defined"
        )
    return torch.where(places < 0, places + size, places)


def _numbers(data: Tensor) -> Tensor:
    return torch.arange(data.numel()).reshape(data.shape)


def _scatter(data: Tensor, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """`places` holds, for each element of `updates`, its number in `data`."""
    flat, to, values = data.flatten().clone(), places.flatten(), updates.flatten()
    if mode == "update":
        flat[to] = values
    elif mode in ("add", "sub"):
        flat.index_add_(0, to, values, alpha=1 if mode == "add" else -1)
    else:
        kind = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}[mode]
        flat.scatter_reduce_(0, to, 1 / values if mode == "div" else values, kind)
    return flat.reshape(data.shape)
