"""What recorded calls say of the inputs of layers: second moments, gathered a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract


@dataclass
class Moments:
    """Of one layer's inputs x over all recorded positions, in float64.

    `second` [columns + 1, columns + 1] is the weighted mean of [x, 1] [x, 1]^T; the last row and
    column are the means, which let a bias be fitted too. For a convolution x is a patch:
    columns = channels × kernel height × kernel width, in the order of the weight's.
    """

    second: torch.Tensor
    weight: float = 0.0

    @property
    def mean(self) -> torch.Tensor:
        return self.second[:-1, -1]


def call_weights(calls: Sequence[Call], early: float) -> list[float]:
    """1 for every call, and up to 1 + `early` for those where the noise is strongest.

    Early steps decide what is in the picture (OBS-Diff, arXiv 2510.06751, section 3.3). Calls
    without a timestep count alike.
    """
    times = [float(call.feeds["timestep"].max()) if "timestep" in call.feeds else 0.0
             for call in calls]  # fmt: skip
    last = max(times, default=0.0) or 1.0
    return [1.0 + early * time / last for time in times]


def gather_moments(
    network: torch.nn.Module,
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    layers: Sequence[str],
    weights: Sequence[float],
    budget_bytes: int = 1 << 30,
) -> Iterable[tuple[str, Moments]]:
    """Moments of each of `layers` (qualified names in `network`), as few at once as fit.

    `module` is the component whose `forward` takes the contract's inputs and runs `network`. The
    calls are replayed once for every group of layers whose moments fit `budget_bytes` together.
    """
    for group in _groups(network, layers, budget_bytes):
        found = _replay(network, module, contract, calls, group, weights)
        for name in group:
            yield name, found.pop(name)


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


def _replay(
    network: torch.nn.Module,
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    layers: Sequence[str],
    weights: Sequence[float],
) -> dict[str, Moments]:
    import torch

    found: dict[str, Moments] = {}
    current = 1.0

    def watch(name: str) -> Any:
        def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = rows_of(layer, inputs[0])
            ones = torch.ones(len(x), 1, dtype=x.dtype)
            x = torch.cat([x, ones], dim=1).double()
            moments = found.setdefault(name, Moments(x.new_zeros(x.shape[1], x.shape[1])))
            moments.second += (current / len(x)) * (x.T @ x)
            moments.weight += current

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.no_grad():
            for call, weight in zip(calls, weights, strict=True):
                current = weight
                module(*feeds_of(contract, call.feeds))
    finally:
        for hook in hooks:
            hook.remove()
    for moments in found.values():
        moments.second /= moments.weight
    return found


def feeds_of(contract: Contract, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
    """A call's feeds in the order of the contract's inputs."""
    import numpy as np
    import torch

    return [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in contract.inputs]


def rows_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's input as rows that its weight, flattened, multiplies: [positions, columns]."""
    import torch

    if isinstance(layer, torch.nn.Conv2d):
        patches = torch.nn.functional.unfold(
            x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)
