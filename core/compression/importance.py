"""In which order the units of a site may go, by three measures of what they are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffoundry.compression.merging import rank_heads
from diffoundry.compression.statistics import Moments
from diffoundry.models.pruning import Site, columns_of

if TYPE_CHECKING:
    import torch

Measure = Literal["l1", "variance", "second_order"]
DAMPING = 0.01
"""Added to the second moments' diagonal, as a share of its mean (OBS-Diff's value)."""


@dataclass(frozen=True)
class Ranking:
    """Units from the first to go to the last to stay. A prefix of it is what a ratio removes."""

    site: Site
    order: tuple[int, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """The `count` most valuable units, rising."""
        return tuple(sorted(self.order[self.site.units - count :]))

    def possible_counts(self) -> tuple[int, ...]:
        """How many units may stay, from all but one round down to one round."""
        return tuple(range(self.site.units - self.site.groups, 0, -self.site.groups))


def rank(
    network: torch.nn.Module,
    site: Site,
    measure: Measure,
    moments: Moments,
    damping: float = DAMPING,
    merging: bool = False,
) -> Ranking:
    """Order the units of `site`. Where a norm's groups must stay balanced, units go in rounds of
    one from each group, the least valuable of each. `merging`: heads that another can take over
    from are worth little."""
    import torch

    if merging and measure == "variance" and site.kind == "heads":
        return Ranking(site, rank_heads(network, site, moments))
    if measure == "second_order":
        return Ranking(site, _second_order(network, site, moments, damping))
    worth = l1_norms(network, site) if measure == "l1" else output_variances(network, site, moments)
    per_group = worth.reshape(site.groups, -1)
    order = torch.argsort(per_group, dim=1, stable=True)
    offset = torch.arange(site.groups)[:, None] * per_group.shape[1]
    return Ranking(site, tuple((order + offset).T.flatten().tolist()))


def l1_norms(network: torch.nn.Module, site: Site) -> torch.Tensor:
    """L1 norm of what makes each unit, as torch.nn.utils.prune.ln_structured (n=1, dim=0) ranks
    the rows of one layer; a unit of several rows or layers has their sum: float64 [units]."""
    import torch

    worth = torch.zeros(site.units, dtype=torch.float64)
    for name, repeats in site.producers:
        if name.endswith("time_emb_proj"):
            continue  # it adds to conv1's channels, whose filters are what is ranked
        weight: Any = network.get_submodule(name).weight
        rows = weight.detach().double().flatten(1).abs().sum(1)
        worth += rows.reshape(repeats, site.units, site.width).sum((0, 2))
    return worth


def output_variances(network: torch.nn.Module, site: Site, moments: Moments) -> torch.Tensor:
    """Variance of what each unit adds to the consumer's output, summed over it: [units]."""
    import torch

    weight, columns = _consumer(network, site)
    covariance = moments.second[:-1, :-1] - torch.outer(moments.mean, moments.mean)
    worth = torch.zeros(site.units, dtype=torch.float64)
    for unit in range(site.units):
        own = columns[unit]
        part = weight[:, own]
        worth[unit] = ((part @ covariance[own][:, own]) * part).sum()
    return worth


def _consumer(network: torch.nn.Module, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """The consumer's weight as a matrix [outputs, columns], and each unit's columns [units, n]."""
    import torch

    layer: Any = network.get_submodule(site.consumer)
    weight = layer.weight.detach().double().flatten(1).clone()  # it is changed in place
    taps = layer.weight[0, 0].numel()
    columns = [
        [column * taps + tap for column in columns_of(site, [unit]) for tap in range(taps)]
        for unit in range(site.units)
    ]
    return weight, torch.tensor(columns)


ROUNDS = 64
"""A round removes at most one of so many units that are left of a group: beyond that size one
unit at a time would take hours, and change little."""


def _second_order(
    network: torch.nn.Module, site: Site, moments: Moments, damping: float
) -> tuple[int, ...]:
    """Optimal Brain Surgeon, a unit at a time (Hassibi & Stork 1993; structured as in OBS-Diff).

    Removing the columns P and moving all others to their best values costs
    tr(W_P [H^-1_PP]^-1 W_P^T); after each removal H^-1 and W are those of what is left. Where
    groups must stay balanced, or there are more than ROUNDS units, a round removes several.
    """
    import torch

    weight, columns = _consumer(network, site)
    inverse = _inverse(moments.second[:-1, :-1], damping)
    left = [list(range(g * site.units // site.groups, (g + 1) * site.units // site.groups))
            for g in range(site.groups)]  # fmt: skip
    order: list[int] = []
    units = torch.arange(site.units)
    while any(left):
        own = columns[units]
        blocks = inverse[own[:, :, None], own[:, None, :]]
        parts = weight[:, own].permute(1, 2, 0)
        solved = _solve(blocks, parts)
        cost = dict(zip(units.tolist(), (parts * solved).sum((1, 2)).tolist(), strict=True))
        at_once = -(-len(left[0]) // ROUNDS)
        firsts = [sorted(group, key=cost.__getitem__)[:at_once] for group in left]
        gone = [unit for one_of_each in zip(*firsts, strict=True) for unit in one_of_each]
        for group, some in zip(left, firsts, strict=True):
            for unit in some:
                group.remove(unit)
        order += gone
        units = torch.tensor([unit for group in left for unit in group], dtype=torch.long)
        if any(left):
            _remove(weight, inverse, columns[gone].flatten())
            weight, inverse, columns = _smaller(weight, inverse, columns, units)
    return tuple(order)


def _inverse(second: torch.Tensor, damping: float) -> torch.Tensor:
    """The inverse of the damped moments, in two matrices' memory."""
    import torch

    factor = torch.linalg.cholesky(damped(second, damping))
    return torch.cholesky_inverse(factor)


def _remove(weight: torch.Tensor, inverse: torch.Tensor, own: torch.Tensor) -> None:
    """W and H^-1 after the columns `own` are gone, in place (theirs become an identity's)."""
    block = inverse[own][:, own]
    share = _solve(block, inverse[own])
    weight.addmm_(weight[:, own], share, alpha=-1)
    inverse.addmm_(inverse[:, own], share, alpha=-1)
    weight[:, own] = 0
    inverse[own] = 0
    inverse[:, own] = 0
    inverse[own, own] = 1


def _smaller(
    weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All three without the columns that are gone, once a quarter is: rounds cost their square."""
    import torch

    stay = columns[units].flatten().sort().values
    if len(stay) > 0.75 * len(inverse):
        return weight, inverse, columns
    place = torch.full((len(inverse),), -1)
    place[stay] = torch.arange(len(stay))
    moved = torch.full_like(columns, -1)
    moved[units] = place[columns[units]]
    return weight[:, stay], inverse[stay[:, None], stay], moved


def _solve(block: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """block^-1 right, of one or many positive definite blocks; by LU where rounding has made one
    indefinite."""
    import torch

    factor, problems = torch.linalg.cholesky_ex(block)
    if problems.any():
        return torch.linalg.solve(block, right)
    return torch.cholesky_solve(right, factor)


def damped(second: torch.Tensor, damping: float) -> torch.Tensor:
    """The second moments with `damping` × the mean of their diagonal added to it."""
    import torch

    matrix = second.clone()
    amount = max(damping * float(torch.diagonal(second).mean()), 1e-12)
    matrix.diagonal().add_(amount)
    return matrix
