"""What a network costs: parameters, and multiply-adds of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from diffoundry.models.pruning import Site

if TYPE_CHECKING:
    import torch

Cost = Literal["parameters", "multiply_adds"]


def count_parameters(module: torch.nn.Module) -> int:
    """Parameters of the module."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_multiply_adds(module: torch.nn.Module, feeds: Sequence[torch.Tensor]) -> dict[str, int]:
    """Multiply-adds of every linear layer and convolution in one call, by qualified name.

    Attention products are not layers, and are left out: pruned heads save those besides.
    """
    import torch

    found: dict[str, int] = {}
    hooks = []

    def watch(name: str, layer: Any) -> Any:
        def hook(_: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            outputs = layer.weight.shape[0]
            positions = output.numel() // outputs
            found[name] = found.get(name, 0) + positions * layer.weight.numel()

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            hooks.append(layer.register_forward_hook(watch(name, layer)))
    try:
        with torch.no_grad():
            module(*feeds)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def unit_costs(
    network: torch.nn.Module, sites: Sequence[Site], multiply_adds: dict[str, int] | None
) -> dict[str, float]:
    """Site name -> what leaves with one unit, in parameters or, where given, multiply-adds."""
    if multiply_adds is None:
        return {site.name: float(site.parameters(network)) for site in sites}
    costs = {}
    for site in sites:
        columns = site.units * site.width
        total = multiply_adds.get(site.consumer, 0) / columns
        for name, repeats in site.producers:
            total += multiply_adds.get(name, 0) / (columns * repeats) * repeats
        costs[site.name] = total * site.width
    return costs
