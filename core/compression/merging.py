"""Heads that give nearly the same: one of them takes over the other's part of the projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffoundry.compression.statistics import Moments
from diffoundry.models.pruning import Site, columns_of

if TYPE_CHECKING:
    import torch

EXPLAINED = 0.9
"""Heads merge where one makes at least this share of the variance that the other adds."""


class _Heads:
    """Columns, covariance and projection of the heads of one site, float64."""

    def __init__(self, network: torch.nn.Module, site: Site, moments: Moments) -> None:
        import torch

        layer: Any = network.get_submodule(site.consumer)
        self.weight = layer.weight.detach().double()
        self.mean = moments.mean
        self.covariance = moments.second[:-1, :-1] - torch.outer(moments.mean, moments.mean)
        self.columns = [torch.tensor(columns_of(site, [unit])) for unit in range(site.units)]

    def variance(self, unit: int) -> float:
        """Of what the head adds to the output, summed over it."""
        own = self.columns[unit]
        part = self.weight[:, own]
        return float(((part @ self.covariance[own][:, own]) * part).sum())

    def map_from(self, unit: int, other: int) -> tuple[torch.Tensor, float]:
        """The matrix A for which A x_other comes nearest to x_unit (least squares), and the
        variance of what the head adds that it leaves unexplained."""
        import torch

        own, its = self.columns[unit], self.columns[other]
        inner = self.covariance[its][:, its].clone()
        inner.diagonal().add_(max(1e-6 * float(inner.diagonal().mean()), 1e-12))
        matrix = torch.linalg.solve(inner, self.covariance[its][:, own]).T
        rest = self.covariance[own][:, own] - matrix @ self.covariance[its][:, own]
        part = self.weight[:, own]
        return matrix, max(0.0, float(((part @ rest) * part).sum()))


def rank_heads(network: torch.nn.Module, site: Site, moments: Moments) -> tuple[int, ...]:
    """The heads in the order in which they may go: by the variance of what they add, or of what
    is left of it once another head that stays has taken over what the two share."""
    heads = _Heads(network, site, moments)
    alone = [heads.variance(unit) for unit in range(site.units)]
    shared = {
        (unit, other): heads.map_from(unit, other)[1]
        for unit in range(site.units)
        for other in range(site.units)
        if unit != other
    }
    left, order = list(range(site.units)), []

    def worth(unit: int) -> float:
        rest = min((shared[unit, other] for other in left if other != unit), default=alone[unit])
        return rest if rest <= (1 - EXPLAINED) * alone[unit] else alone[unit]

    while left:
        gone = min(left, key=lambda unit: (worth(unit), alone[unit]))
        left.remove(gone)
        order.append(gone)
    return tuple(order)


def merge_heads(
    network: torch.nn.Module, site: Site, kept: Sequence[int], moments: Moments
) -> tuple[tuple[int, int], ...]:
    """Before a cut: let heads that stay take over from those that go, in place.

    The columns of the output projection of a head that goes are added to those of the head that
    explains it best, through the least-squares map between the two. Returns (gone, taken over by).
    """
    heads = _Heads(network, site, moments)
    layer: Any = network.get_submodule(site.consumer)
    weight, bias = heads.weight.clone(), None
    if layer.bias is not None:
        bias = layer.bias.detach().double().clone()
    merged = []
    for unit in sorted(set(range(site.units)) - set(kept)):
        rest, other = min((heads.map_from(unit, other)[1], other) for other in kept)
        if rest > (1 - EXPLAINED) * heads.variance(unit):
            continue
        matrix, _ = heads.map_from(unit, other)
        own, its = heads.columns[unit], heads.columns[other]
        part = heads.weight[:, own]
        weight[:, its] += part @ matrix
        if bias is not None:
            bias += part @ (heads.mean[own] - matrix @ heads.mean[its])
        merged.append((unit, other))
    if merged:
        layer.weight.data = weight.to(layer.weight.dtype)
        if bias is not None:
            layer.bias.data = bias.to(layer.bias.dtype)
    return tuple(merged)
