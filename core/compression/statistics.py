"""What recorded calls say of the inputs of layers: second moments, gathered a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

BUDGET_BYTES = 1 << 30
"""Of the moments that are in memory at once; one layer's are, whatever their size."""
PIECE = 1 << 22
"""Numbers of a layer's unfolded input that are in memory at once."""
BAND = 2048
"""Rows of the second moments that are added to at once."""
STACK = 16
STACKED = 1 << 15
"""Calls are stacked while there are few of them, and few numbers in their first input."""


@dataclass
class Moments:
    """Of one layer's inputs x over all recorded positions, in float64.

    `second` [columns + 1, columns + 1] is the weighted mean of [x, 1] [x, 1]^T; the last row and
    column are the means, which let a bias be fitted too. For a convolution x is a patch:
    columns = channels × kernel height × kernel width, in the order of the weight's.
    `cross` [outputs, columns + 1] is that of y [x, 1]^T, where y is what the layer should give.
    """

    second: torch.Tensor
    weight: float = 0.0
    cross: torch.Tensor | None = None

    @property
    def mean(self) -> torch.Tensor:
        return self.second[:-1, -1]


@dataclass(frozen=True)
class Batch:
    """Calls of one shape, stacked: inputs and outputs in the contract's order, a weight a row."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    weights: torch.Tensor


def call_weights(calls: Sequence[Call], early: float) -> list[float]:
    """1 for every call, and up to 1 + `early` for those where the noise is strongest.

    Early steps decide what is in the picture (OBS-Diff, arXiv 2510.06751, section 3.3). Calls
    without a timestep count alike.
    """
    times = [float(call.feeds["timestep"].max()) if "timestep" in call.feeds else 0.0
             for call in calls]  # fmt: skip
    last = max(times, default=0.0) or 1.0
    return [1.0 + early * time / last for time in times]


def feeds_of(contract: Contract, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
    """A call's feeds in the order of the contract's inputs."""
    import numpy as np
    import torch

    return [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in contract.inputs]


def same_shape(calls: Sequence[Call]) -> list[list[int]]:
    """Numbers of the calls that can be stacked: equal in every axis but the batch."""
    groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for number, call in enumerate(calls):
        shape = {axis: size for axis, size in call.shape.items() if axis != "batch"}
        groups.setdefault(tuple(sorted(shape.items())), []).append(number)
    return list(groups.values())


def batches_of(
    contract: Contract, calls: Sequence[Call], weights: Sequence[float] | None = None
) -> Iterator[Batch]:
    """The calls in stacks that stay small, so that a network of any size runs as it did."""
    import numpy as np
    import torch

    for group in same_shape(calls):
        numbers = calls[group[0]].feeds[contract.inputs[0].name].size
        size = max(1, min(STACK, STACKED // numbers))
        for start in range(0, len(group), size):
            part = [calls[number] for number in group[start : start + size]]
            rows = [feeds_of(contract, call.feeds) for call in part]
            outputs = [
                [torch.from_numpy(np.ascontiguousarray(call.outputs[spec.name])) for call in part]
                for spec in contract.outputs
            ]
            each = [
                torch.full((len(row[0]),), weights[number] if weights else 1.0)
                for row, number in zip(rows, group[start : start + size], strict=True)
            ]
            yield Batch(
                tuple(torch.cat(column) for column in zip(*rows, strict=True)),
                tuple(torch.cat(column) for column in outputs),
                torch.cat(each),
            )


def no_moments(layer: Any, with_target: bool = False) -> Moments:
    """Moments of nothing yet for a linear layer or a convolution."""
    import torch

    columns = layer.weight[0].numel() + 1
    cross = torch.zeros(len(layer.weight), columns, dtype=torch.float64) if with_target else None
    return Moments(torch.zeros(columns, columns, dtype=torch.float64), 0.0, cross)


def add_moments(
    moments: Moments,
    name: str,
    layer: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    target: torch.Tensor | None = None,
) -> None:
    """Add a batch's inputs of the layer called `name`, and what it should give for them.

    Calls count by their `weights` [batch], however many positions they have. Raises StageError
    where a value is not finite.
    """
    import torch

    if not torch.isfinite(x).all() or (target is not None and not torch.isfinite(target).all()):
        raise _unusable(name, "NaN or infinity")
    share = (weights / positions(layer, x)).sqrt()
    for rows, wanted in pieces(layer, x, target, share):
        for part in torch.arange(rows.shape[1]).split(BAND):  # the whole product is a gigabyte
            moments.second[part[0] : part[-1] + 1] += rows[:, part].T @ rows
        if wanted is not None and moments.cross is not None:
            moments.cross += wanted.T @ rows
    moments.weight += float(weights.sum())


def mean_moments(name: str, moments: Moments) -> Moments:
    """The means of what was added. Raises StageError where float32 could not hold the sums."""
    moments.second /= moments.weight
    if moments.cross is not None:
        moments.cross /= moments.weight
    # The sum of what is not finite isn't either, and needs no copy of a gigabyte.
    if not math.isfinite(float(moments.second.sum())):
        raise _unusable(name, "values whose squares overflow")
    return moments


def _unusable(name: str, found: str) -> StageError:
    return StageError(
        f"pruning: the layer {name}",
        expected="finite activations on the recorded calls",
        found=f"{found} in what it reads",
        remedy="keep its block whole (the option keep), or repair the model",
    )


def gather_moments(
    network: torch.nn.Module,
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    layers: Sequence[str],
    weights: Sequence[float],
    budget_bytes: int = BUDGET_BYTES,
) -> Iterator[tuple[str, Moments]]:
    """Moments of each of `layers` (qualified names in `network`), as few at once as fit.

    `module` is the component whose `forward` takes the contract's inputs and runs `network`. The
    calls are replayed once for every group of layers whose moments fit `budget_bytes` together.
    Raises StageError, which names the layer, where activations are not finite.
    """
    for group in _groups(network, layers, budget_bytes):
        found = _replay(network, module, contract, calls, group, weights)
        for name in group:
            yield name, mean_moments(name, found.pop(name))


def _replay(
    network: torch.nn.Module,
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    layers: Sequence[str],
    weights: Sequence[float],
) -> dict[str, Moments]:
    import torch

    found = {name: no_moments(network.get_submodule(name)) for name in layers}
    current = torch.ones(1)

    def watch(name: str) -> Any:
        def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            add_moments(found[name], name, layer, inputs[0], current)

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.no_grad():
            for batch in batches_of(contract, calls, weights):
                current = batch.weights
                module(*batch.inputs)
    finally:
        for one in hooks:
            one.remove()
    return found


def _groups(network: Any, layers: Sequence[str], budget_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    used = budget_bytes
    for name in layers:
        size = 8 * (network.get_submodule(name).weight[0].numel() + 1) ** 2
        if used + size > budget_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def positions(layer: Any, x: torch.Tensor) -> int:
    """How many rows the layer's input makes for one call."""
    import torch

    if isinstance(layer, torch.nn.Conv2d):
        return math.prod(_output_size(layer, x))
    return x[..., 0].numel() // len(x)


def _output_size(layer: torch.nn.Conv2d, x: torch.Tensor) -> tuple[int, int]:
    height, width = (
        (x.shape[2 + i] + 2 * int(layer.padding[i])
         - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1) // layer.stride[i] + 1
        for i in range(2)
    )  # fmt: skip
    return height, width


def pieces(
    layer: Any,
    x: torch.Tensor,
    target: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The layer's input as rows [positions, columns + 1] that its flattened weight and bias
    multiply, and the target's rows beside them; a piece at a time.

    A convolution's input unfolded is as many times larger as its kernel has taps: a decoder's
    would not fit. `scale` [batch] multiplies all rows of a call.
    """
    import torch

    ones = torch.ones(len(x), dtype=x.dtype) if scale is None else scale.to(x.dtype)
    if isinstance(layer, torch.nn.Conv2d):
        (up, left), (height, width) = layer.padding, _output_size(layer, x)
        padded = torch.nn.functional.pad(x, (int(left), int(left), int(up), int(up)))
        reach = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        strip = max(1, PIECE // (len(x) * width * layer.weight[0].numel()))
        for top in range(0, height, strip):
            end = min(height, top + strip)
            part = padded[:, :, top * layer.stride[0] : (end - 1) * layer.stride[0] + reach]
            rows = torch.nn.functional.unfold(part, layer.kernel_size, layer.dilation, 0,
                                              layer.stride).transpose(1, 2)  # fmt: skip
            wanted = None
            if target is not None:
                wanted = target[:, :, top:end].flatten(2).transpose(1, 2)
            yield _scaled(rows, wanted, ones)
        return
    rows = x.reshape(len(x), -1, x.shape[-1])
    goal = None if target is None else target.reshape(len(x), -1, target.shape[-1])
    size = max(1, PIECE // (len(x) * x.shape[-1]))
    for start in range(0, rows.shape[1], size):
        yield _scaled(rows[:, start : start + size],
                      None if goal is None else goal[:, start : start + size], ones)  # fmt: skip


def _scaled(
    rows: torch.Tensor, wanted: torch.Tensor | None, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    import torch

    each = scale[:, None, None]
    with_one = torch.cat([rows * each, each.expand(-1, rows.shape[1], 1)], dim=2).flatten(0, 1)
    return with_one, None if wanted is None else (wanted * each).flatten(0, 1)
