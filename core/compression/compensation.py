"""Moving the surviving weights so that they do the work of those that are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffoundry.compression.importance import DAMPING
from diffoundry.compression.statistics import Moments
from diffoundry.models.pruning import Site, columns_of, cut

if TYPE_CHECKING:
    import torch


def cut_site(
    network: torch.nn.Module,
    site: Site,
    kept: Sequence[int],
    moments: Moments | None,
    damping: float = DAMPING,
) -> None:
    """Cut `site` down to `kept`; with `moments` the consumer is fitted anew by least squares.

    The fit is W' = W H[:, K] (H_KK + damping)^-1 over inputs with a constant one, so that the bias
    moves too. Raises ModelError where nothing would be left, or a norm's groups be unbalanced.
    """
    fitted = None if moments is None else fit(network, site, kept, moments, damping)
    cut(network, site, kept)
    if fitted is not None:
        layer: Any = network.get_submodule(site.consumer)
        weight, bias = fitted
        layer.weight.data = weight.to(layer.weight.dtype).reshape(layer.weight.shape)
        if layer.bias is not None:
            layer.bias.data = bias.to(layer.bias.dtype)


def fit(
    network: torch.nn.Module, site: Site, kept: Sequence[int], moments: Moments, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The consumer's weight [outputs, kept columns] and bias [outputs] that come nearest to the
    full layer's outputs on the recorded inputs, float64."""
    import torch

    layer: Any = network.get_submodule(site.consumer)
    weight = layer.weight.detach().double().flatten(1)
    taps = layer.weight[0, 0].numel()
    columns = [c * taps + tap for c in columns_of(site, kept) for tap in range(taps)]
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if layer.bias is not None:
        bias = layer.bias.detach().double()
        columns.append(len(moments.second) - 1)
    index = torch.tensor(columns)
    whole = torch.cat([weight, torch.zeros_like(bias)[:, None]], dim=1)
    # W x = what the kept part must reproduce; the damping draws towards the old weights.
    normal = moments.second[index][:, index]
    amount = max(damping * float(torch.diagonal(moments.second)[:-1].mean()), 1e-12)
    ridge = amount * torch.eye(len(index), dtype=torch.float64)
    if layer.bias is not None:
        ridge[-1, -1] = 1e-9
    start = whole[:, index]
    wanted = whole @ moments.second[:, index] + start @ ridge
    fitted = torch.linalg.solve(normal + ridge, wanted.T).T
    if layer.bias is None:
        return fitted, bias
    return fitted[:, :-1], bias + fitted[:, -1]
