"""Reference calls at shapes other than those of the trajectories, from the same real values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffoundry.capture.asked import NamedShape
from diffoundry.capture.reference import Reference
from diffoundry.formats.recording import Call, ShapeCall, spread
from diffoundry.types import Array, AxisRef, Contract, Shape


def record_shapes(
    reference: Reference,
    calls: Sequence[Call],
    declared: Sequence[NamedShape],
    untraced: Sequence[NamedShape],
    one_by_one: bool = False,
) -> tuple[ShapeCall, ...]:
    """One reference call at each shape, on the axes that the component has; doubles once.

    `one_by_one`: the pictures of a batch are computed one after the other, see `_in_rows`.
    """
    contract = reference.contract
    found: dict[NamedShape, ShapeCall] = {}
    for shapes, traced in ((declared, True), (untraced, False)):
        for named in shapes:
            own = own_shape(contract, named)
            if own not in found:
                feeds = feeds_at(contract, calls, dict(own))
                outputs = (_in_rows if one_by_one else Reference.infer)(reference, feeds)
                found[own] = ShapeCall(feeds, outputs, dict(own), calls[0].prompt, traced)
    return tuple(found.values())


def _in_rows(reference: Reference, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What the original makes of each picture of a batch alone.

    A call of several pictures holds all their activations, and PyTorch rounds more coarsely there:
    Stable Diffusion's decoder at 2 × 320 × 256 is 3.9e-5 off float64, one picture 2.6e-6. Where no
    float64 is computed at a shape, that would be laid to the engine.
    """
    batch = next(iter(feeds.values())).shape[0]
    rows = [
        reference.infer({name: array[i : i + 1] for name, array in feeds.items()})
        for i in range(batch)
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def own_shape(contract: Contract, shape: NamedShape) -> NamedShape:
    """The shape on the axes that the component has."""
    axes = {axis.name for axis in contract.axes}
    return tuple(pair for pair in shape if pair[0] in axes)


def resized(contract: Contract, call: Call, shape: Shape) -> Call:
    """A recorded call's feeds at another shape; what the original makes of them is not known."""
    return Call(feeds_at(contract, [call], shape), {}, dict(shape), call.prompt)


def feeds_at(contract: Contract, calls: Sequence[Call], shape: Shape) -> dict[str, Array]:
    """Feeds of `shape` made of recorded ones.

    Each place of a batch takes another recorded call, so that a mix-up of the batch shows.
    Sides are cropped, or repeated as a mirror image: real values, without a seam.
    """
    feeds = {}
    for spec in contract.inputs:
        wanted = spec.shape(shape)
        # Far apart, so that rows differ in every input (guided steps come in pairs).
        chosen = spread(calls, wanted[0])
        array = np.concatenate([call.feeds[spec.name] for call in chosen])
        for position, (dim, size) in enumerate(zip(spec.dims, wanted, strict=True)):
            if not isinstance(dim, AxisRef):
                continue
            length = array.shape[position]
            index = np.arange(size) % length if position == 0 else _mirrored(size, length)
            array = np.take(array, index, axis=position)
        feeds[spec.name] = np.ascontiguousarray(array)
    return feeds


def _mirrored(size: int, length: int) -> Array:
    """Indices 0..length−1, back again, and so on: `size` of them."""
    position = np.arange(size) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)
