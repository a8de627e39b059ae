"""Prunes one component: ranks, measures what each cut does, allots, cuts and compensates."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffoundry.compression.allocation import Ladder, Rung, allocate, rung_counts
from diffoundry.compression.compensation import cut_site
from diffoundry.compression.costs import (
    Cost,
    count_multiply_adds,
    count_parameters,
    unit_costs,
)
from diffoundry.compression.importance import DAMPING, Measure, Ranking, rank
from diffoundry.compression.statistics import Moments, call_weights, feeds_of, gather_moments
from diffoundry.models.pruning import Site, SiteKind, find_sites

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

RUNGS = 6
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to prune. `ratio` of `cost` leaves; `keep` are patterns of block names left whole;
    `floor` is the share of its units that each block keeps at least."""

    ratio: float
    cost: Cost = "parameters"
    kinds: tuple[SiteKind, ...] = ("channels", "feed_forward", "heads")
    importance: Measure = "second_order"
    compensate: bool = True
    damping: float = DAMPING
    early: float = 1.0
    keep: tuple[str, ...] = ()
    floor: float = 0.25


@dataclass(frozen=True)
class Cut:
    """What was cut at one site, and what that alone did to the outputs (relative square error)."""

    site: Site
    kept: tuple[int, ...]
    damage: float


@dataclass(frozen=True)
class Pruned:
    """The outcome: cuts in the order of the network, and what it cost before and after."""

    cuts: tuple[Cut, ...]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]


def prune(
    module: torch.nn.Module,
    contract: Contract,
    calibration: Sequence[Call],
    tuning: Sequence[Call],
    settings: Settings,
    say: Say = lambda line: None,
) -> Pruned:
    """Prune a component in place, by calls of the calibration and the tuning split.

    Raises StageError where the target cannot be reached.
    """
    network = network_of(module)
    feeds = feeds_of(contract, calibration[0].feeds)
    before = count_parameters(module), sum(count_multiply_adds(module, feeds).values())
    sites = choose_sites(network, settings)
    weights = call_weights(calibration, settings.early)
    replay = _Replay(network, module, contract, calibration, weights)
    ladders, rankings = measure(replay, sites, tuning, settings, say)
    total = before[0] if settings.cost == "parameters" else before[1]
    left = allocate(ladders, settings.ratio * total)
    cuts = []
    for site in sites:
        if left[site.name] == site.units:
            continue
        kept = rankings[site.name].kept(left[site.name])
        # Anew, on what the blocks before it have become.
        moments = replay.moments(site) if settings.compensate else None
        cut_site(network, site, kept, moments, settings.damping)
        rungs = next(one.rungs for one in ladders if one.site == site.name)
        damage = next(rung.damage for rung in rungs if rung.kept == len(kept))
        cuts.append(Cut(site, kept, damage))
        say(f"{site.name}: {len(kept)} of {site.units} stay")
    after = count_parameters(module), sum(count_multiply_adds(module, feeds).values())
    return Pruned(tuple(cuts), (before[0], after[0]), (before[1], after[1]))


def network_of(module: torch.nn.Module) -> Any:
    """What a component's flat module wraps: the names of its blocks are those of its files."""
    return getattr(module, "network", module)


def choose_sites(network: torch.nn.Module, settings: Settings) -> tuple[Site, ...]:
    """The sites of the asked kinds whose blocks the keep-list does not name."""
    return tuple(
        site
        for site in find_sites(network)
        if site.kind in settings.kinds
        and not any(fnmatch.fnmatch(site.module, pattern) for pattern in settings.keep)
    )


@dataclass
class _Replay:
    network: torch.nn.Module
    module: torch.nn.Module
    contract: Contract
    calls: Sequence[Call]
    weights: Sequence[float]

    def moments(self, site: Site) -> Moments:
        """The moments of what the site's consumer reads now: one layer's at a time in memory."""
        ((_, found),) = gather_moments(
            self.network, self.module, self.contract, self.calls, [site.consumer], self.weights
        )
        return found


def measure(
    replay: _Replay,
    sites: Sequence[Site],
    tuning: Sequence[Call],
    settings: Settings,
    say: Say,
) -> tuple[list[Ladder], dict[str, Ranking]]:
    """Rank each site's units, and try it alone at a few sizes on the tuning calls."""
    network, module, contract = replay.network, replay.module, replay.contract
    multiply_adds = None
    if settings.cost == "multiply_adds":
        counted = count_multiply_adds(module, feeds_of(contract, replay.calls[0].feeds))
        multiply_adds = {name.removeprefix("network."): n for name, n in counted.items()}
    costs = unit_costs(network, sites, multiply_adds)
    ladders, rankings = [], {}
    for number, site in enumerate(sites, 1):
        say(f"{site.name}: measuring ({number}/{len(sites)})")
        moments = replay.moments(site)
        ranking = rank(network, site, settings.importance, moments, settings.damping)
        rankings[site.name] = ranking
        counts = rung_counts(ranking.possible_counts(), site.units, settings.floor, RUNGS)
        rungs = []
        for count in counts:
            with _tried(network, site):
                cut_site(network, site, ranking.kept(count),
                         moments if settings.compensate else None, settings.damping)  # fmt: skip
                rungs.append(Rung(count, damage_of(module, contract, tuning)))
        ladders.append(Ladder(site.name, site.units, costs[site.name], tuple(rungs)))
    return ladders, rankings


class _tried:  # noqa: N801
    """A block that is a copy for as long as something is tried on it."""

    def __init__(self, network: torch.nn.Module, site: Site) -> None:
        above, _, self._name = site.module.rpartition(".")
        self._parent = network.get_submodule(above)

    def __enter__(self) -> None:
        self._block = getattr(self._parent, self._name)
        setattr(self._parent, self._name, copy.deepcopy(self._block))

    def __exit__(self, *_: object) -> None:
        setattr(self._parent, self._name, self._block)


def damage_of(module: torch.nn.Module, contract: Contract, calls: Sequence[Call]) -> float:
    """Mean square error of the outputs over their mean square, worst output, mean of the calls."""
    import numpy as np
    import torch

    total = 0.0
    for call in calls:
        with torch.no_grad():
            made = module(*feeds_of(contract, call.feeds))
        outputs = made if isinstance(made, tuple) else (made,)
        worst = 0.0
        for spec, output in zip(contract.outputs, outputs, strict=True):
            wanted = torch.from_numpy(np.ascontiguousarray(call.outputs[spec.name])).double()
            error = (output.double() - wanted).square().mean() / wanted.square().mean()
            worst = max(worst, float(error))
        total += worst
    return total / len(calls)
