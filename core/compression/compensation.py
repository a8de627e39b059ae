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
    index = torch.tensor(columns)
    second = moments.second
    amount = damping * float(torch.diagonal(second)[:-1].mean())
    wanted = weight @ second[:-1]
    index_and_one = torch.cat([index, torch.tensor([len(second) - 1])])
    fitted, bias = _least_squares(
        second[index_and_one][:, index_and_one],
        wanted[:, index_and_one],
        weight[:, index],
        amount,
        layer.bias is not None,
    )
    return fitted, bias + (0.0 if layer.bias is None else layer.bias.detach().double())


def solve(layer: Any, moments: Moments, damping: float) -> None:
    """Give `layer` the weights, and a bias where it has one, that come nearest to the target of
    the moments, in place; the moments are used up. The damping draws towards the weights that it
    has."""
    import torch

    if moments.cross is None:
        raise ValueError("moments without a target")
    amount = damping * float(torch.diagonal(moments.second)[:-1].mean())
    before = torch.zeros(len(layer.weight), dtype=torch.float64)
    if layer.bias is not None:
        before = layer.bias.detach().double()
    wanted = moments.cross - torch.outer(before, moments.second[-1])
    weight, bias = _least_squares(
        moments.second, wanted, layer.weight.detach().double().flatten(1), amount,
        layer.bias is not None,
    )  # fmt: skip
    layer.weight.data = weight.to(layer.weight.dtype).reshape(layer.weight.shape)
    if layer.bias is not None:
        layer.bias.data = (before + bias).to(layer.bias.dtype)


def _least_squares(
    second: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor, amount: float, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """W and b that minimise |W x + b - y|^2 + amount |W - start|^2, from E[x x^T] and E[y x^T],
    where the last column of x is one; b is zero unless `bias`. `second` is changed: the widest
    layer's is a gigabyte."""
    import torch

    end = len(second) if bias else len(second) - 1
    normal = second[:end, :end]
    # Also where nothing varies and all is zero, there is one best answer: the weights of before.
    ridge = torch.full((end,), max(amount, 1e-12), dtype=second.dtype)
    if bias:
        ridge[-1] = 1e-9
    normal.diagonal().add_(ridge)
    goal = wanted[:, :end].clone()
    columns = start.shape[1]
    goal[:, :columns] += start * ridge[:columns]
    # `cholesky_solve` would copy the factor, a gigabyte of the widest layer's.
    factor = torch.linalg.cholesky(normal)
    half = torch.linalg.solve_triangular(factor, goal.T, upper=False)
    fitted = torch.linalg.solve_triangular(factor.T, half, upper=True).T
    return fitted[:, :columns], fitted[:, -1] if bias else torch.zeros_like(fitted[:, 0])
