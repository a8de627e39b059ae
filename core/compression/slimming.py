"""One set of weights, several widths: the first units of every site are a network of their own.

The units of each site are put in the order of their importance, which changes nothing; a narrower
network is then a prefix of the wider one (Slimmable networks, Yu et al., arXiv 1812.08928).
So ordered, the narrow ones are what plain pruning leaves. `fit_widths` fits the shared weights to
all widths together by least squares, `distil` trains them; both change the full width too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffoundry.compression.compensation import solve
from diffoundry.compression.importance import Ranking
from diffoundry.compression.recovery import train
from diffoundry.compression.refitting import moments_towards
from diffoundry.compression.replaying import damage_of, network_of
from diffoundry.compression.statistics import call_weights, no_moments
from diffoundry.models.pruning import Site, columns_of, cut, permute

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract


def best_first(ranking: Ranking) -> tuple[int, ...]:
    """The units of a site from the most valuable to the least, within each group of its norm."""
    site = ranking.site
    per_group = site.units // site.groups
    best = ranking.order[::-1]
    return tuple(
        unit for group in range(site.groups) for unit in best if unit // per_group == group
    )


def order_units(network: torch.nn.Module, rankings: Sequence[Ranking]) -> None:
    """Put the units of every ranked site in the order of their worth, in place."""
    for ranking in rankings:
        permute(network, ranking.site, best_first(ranking))


def prefix(site: Site, width: float) -> tuple[int, ...]:
    """The first `width` share of a site's units (of each group's), at least one, rounded up."""
    per_group = site.units // site.groups
    # 0.75 of 4 is 3, whatever a product of floats is.
    left = min(per_group, max(1, math.ceil(per_group * width - 1e-6)))
    return tuple(group * per_group + place for group in range(site.groups) for place in range(left))


def narrow(network: torch.nn.Module, sites: Sequence[Site], width: float) -> None:
    """Leave the first `width` share of the units of every site, in place."""
    for site in sites:
        cut(network, site, prefix(site, width))


class Slices:
    """The parameters of a narrow network as slices of the wide one's, so that gradients of all
    widths meet in one set of weights."""

    def __init__(self, module: torch.nn.Module, sites: Sequence[Site], width: float) -> None:
        self.module = copy.deepcopy(module)
        narrow(network_of(self.module), sites, width)
        wide = network_of(module)
        inside = "" if wide is module else "network."
        self._index: dict[str, list[tuple[int, list[int]]]] = {}
        for site in sites:
            columns = columns_of(site, prefix(site, width))
            of_one = site.units * site.width
            for name, repeats in site.producers:
                rows = [part * of_one + column for part in range(repeats) for column in columns]
                self._note(wide, inside, name, 0, rows)
            if site.kind == "channels":
                self._note(wide, inside, f"{site.module}.norm2", 0, columns)
            self._note(wide, inside, site.consumer, 1, columns)

    def _note(
        self, network: torch.nn.Module, inside: str, name: str, dimension: int, index: list[int]
    ) -> None:
        layer: Any = network.get_submodule(name)
        self._index.setdefault(f"{inside}{name}.weight", []).append((dimension, index))
        if dimension == 0 and layer.bias is not None:
            self._index.setdefault(f"{inside}{name}.bias", []).append((0, index))

    def of(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The narrow network's parameters, cut from the wide one's."""
        import torch

        made = {}
        for name, value in parameters.items():
            for dimension, index in self._index.get(name, []):
                value = value.index_select(dimension, torch.tensor(index))
            made[name] = value
        return made


def fit_widths(
    module: torch.nn.Module,
    sites: Sequence[Site],
    widths: Sequence[float],
    contract: Contract,
    calls: Sequence[Call],
    early: float,
    damping: float,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Fit the shared consumers, in place, so that the widths together come nearest to the
    original's residual streams: one least-squares problem a site, which is the sum of theirs.

    `sites` stand in the order in which a call reaches them: each width is fitted on what its own
    narrower sites before have become.
    """
    import torch

    original = copy.deepcopy(module)
    copies = [copy.deepcopy(module) for _ in widths]
    for one, width in zip(copies, widths, strict=True):
        narrow(network_of(one), sites, width)
    weights = call_weights(calls, early)
    for site in sites:
        say(f"{site.name}: fitting {len(widths)} widths")
        layer: Any = network_of(module).get_submodule(site.consumer)
        taps = layer.weight[0, 0].numel()
        total = no_moments(layer, with_target=True)
        last = len(total.second) - 1
        places = []
        for one, width in zip(copies, widths, strict=True):
            columns = columns_of(site, prefix(site, width))
            places.append(torch.tensor(columns))
            own = [column * taps + tap for column in columns for tap in range(taps)]
            index = torch.tensor([*own, last])
            found = moments_towards((original, network_of(original)), (one, network_of(one)),
                                    contract, calls, weights, site)  # fmt: skip
            total.second[index[:, None], index] += found.second / len(widths)
            if total.cross is not None and found.cross is not None:
                total.cross[:, index] += found.cross / len(widths)
        solve(layer, total, damping)
        for one, place in zip(copies, places, strict=True):
            narrower: Any = network_of(one).get_submodule(site.consumer)
            narrower.weight.data = layer.weight.data.index_select(1, place)
            if layer.bias is not None:
                narrower.bias.data = layer.bias.data.clone()


def distil(
    module: torch.nn.Module,
    sites: Sequence[Site],
    widths: Sequence[float],
    contract: Contract,
    calls: Sequence[Call],
    steps: int,
    rate: float,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Train the shared weights, in place, so that every width gives what the original gave in
    `calls`. Returns the last losses' mean, over all widths."""
    import torch

    slices = [Slices(module, sites, width) for width in widths]

    def run(*inputs: torch.Tensor) -> list[Any]:
        parameters = dict(module.named_parameters())
        return [torch.func.functional_call(one.module, one.of(parameters), inputs)
                for one in slices]  # fmt: skip

    return train(module, run, contract, calls, steps, rate, say=say)


def losses_by_width(
    module: torch.nn.Module,
    sites: Sequence[Site],
    widths: Sequence[float],
    contract: Contract,
    calls: Sequence[Call],
) -> dict[float, float]:
    """Width -> mean square error of the outputs over their mean square, on `calls`."""
    found = {}
    for width in widths:
        tried = copy.deepcopy(module)
        narrow(network_of(tried), sites, width)
        found[width] = damage_of(tried, contract, calls)
    return found
