"""Prunes one component: ranks, measures what each cut does, allots, cuts and compensates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffoundry.compression.allocation import Ladder, Rung, allocate, rung_counts
from diffoundry.compression.compensation import cut_site
from diffoundry.compression.costs import count_multiply_adds, count_parameters, unit_costs
from diffoundry.compression.importance import Ranking, rank
from diffoundry.compression.merging import merge_heads
from diffoundry.compression.replaying import (
    Replay,
    Say,
    Settings,
    choose_sites,
    damage_of,
    in_order_of_use,
    network_of,
    refuse_degenerate,
    sharing_copy,
)
from diffoundry.compression.statistics import feeds_of
from diffoundry.models.pruning import Site

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

__all__ = (
    "Cut",
    "Pruned",
    "Settings",
    "Survey",
    "cut_down",
    "damage_of",
    "network_of",
    "prune",
    "rank_sites",
    "survey",
)

RUNGS = 6


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
    found = survey(module, contract, calibration, tuning, settings, say)
    return cut_down(module, contract, calibration, found, settings, say)


@dataclass(frozen=True)
class Survey:
    """What was found out about a component: how much each site may lose at which damage, and
    which of its units are worth least. Sites stand in the order in which a call reaches them."""

    sites: tuple[Site, ...]
    ladders: tuple[Ladder, ...]
    rankings: Mapping[str, Ranking]


def survey(
    module: torch.nn.Module,
    contract: Contract,
    calibration: Sequence[Call],
    tuning: Sequence[Call],
    settings: Settings,
    say: Say = lambda line: None,
) -> Survey:
    """Rank the units of every site and measure what cuts would do; the ratio plays no part."""
    refuse_degenerate(contract, calibration)
    network = network_of(module)
    feeds = feeds_of(contract, calibration[0].feeds)
    sites = in_order_of_use(module, network, feeds, choose_sites(network, settings))
    replay = Replay(network, module, contract, calibration, settings)
    ladders, rankings = measure(replay, sites, tuning, settings, say)
    return Survey(tuple(sites), tuple(ladders), rankings)


def rank_sites(
    module: torch.nn.Module,
    contract: Contract,
    calibration: Sequence[Call],
    settings: Settings,
    say: Say = lambda line: None,
) -> list[Ranking]:
    """The ranking of every site, in the order in which a call reaches them."""
    refuse_degenerate(contract, calibration)
    network = network_of(module)
    feeds = feeds_of(contract, calibration[0].feeds)
    sites = in_order_of_use(module, network, feeds, choose_sites(network, settings))
    replay = Replay(network, module, contract, calibration, settings)
    rankings = []
    for site, (_, moments) in zip(sites, replay.moments(sites), strict=True):
        say(f"{site.name}: ranking")
        rankings.append(rank(network, site, settings.importance, moments, settings.damping,
                             settings.merges(site)))  # fmt: skip
    return rankings


def cut_down(
    module: torch.nn.Module,
    contract: Contract,
    calibration: Sequence[Call],
    found: Survey,
    settings: Settings,
    say: Say = lambda line: None,
) -> Pruned:
    """Cut the component in place by what a survey of it found.

    Raises StageError where the target cannot be reached.
    """
    network = network_of(module)
    feeds = feeds_of(contract, calibration[0].feeds)
    before = count_parameters(module), sum(count_multiply_adds(module, feeds).values())
    total = before[0] if settings.cost == "parameters" else before[1]
    left = allocate(found.ladders, settings.ratio * total)
    replay = Replay(network, module, contract, calibration, settings)
    if settings.compensate and settings.fit_to == "original":
        replay.keep_original()
    cuts = []
    for site, ladder in zip(found.sites, found.ladders, strict=True):
        if left[site.name] < site.units:
            kept = found.rankings[site.name].kept(left[site.name])
            replay.cut(site, kept)
            damage = next(rung.damage for rung in ladder.rungs if rung.kept == len(kept))
            cuts.append(Cut(site, kept, damage))
            say(f"{site.name}: {len(kept)} of {site.units} stay")
    for _ in range(settings.passes - 1 if replay.original else 0):
        for one in cuts:
            replay.refit(one.site)
    after = count_parameters(module), sum(count_multiply_adds(module, feeds).values())
    return Pruned(tuple(cuts), (before[0], after[0]), (before[1], after[1]))


def measure(
    replay: Replay,
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
    stream = replay.moments(sites)
    for number, site in enumerate(sites):
        _, moments = next(stream)
        say(f"{site.name}: measuring ({number + 1}/{len(sites)})")
        ranking = rank(network, site, settings.importance, moments, settings.damping,
                       settings.merges(site))  # fmt: skip
        rankings[site.name] = ranking
        counts = rung_counts(ranking.possible_counts(), site.units, settings.floor, RUNGS)
        rungs = []
        for count in counts:
            with _tried(network, site):
                if settings.merges(site) and not settings.compensate:
                    merge_heads(network, site, ranking.kept(count), moments)
                cut_site(network, site, ranking.kept(count),
                         moments if settings.compensate else None, settings.damping)  # fmt: skip
                rungs.append(Rung(count, damage_of(module, contract, tuning)))
        ladders.append(Ladder(site.name, site.units, costs[site.name], tuple(rungs)))
        del moments  # a gigabyte of the widest layer's, before the next are gathered
    return ladders, rankings


class _tried:  # noqa: N801
    """A block that is a copy for as long as something is tried on it."""

    def __init__(self, network: torch.nn.Module, site: Site) -> None:
        above, _, self._name = site.module.rpartition(".")
        self._parent = network.get_submodule(above)

    def __enter__(self) -> None:
        self._block = getattr(self._parent, self._name)
        setattr(self._parent, self._name, sharing_copy(self._block))

    def __exit__(self, *_: object) -> None:
        setattr(self._parent, self._name, self._block)
