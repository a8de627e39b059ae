"""The recorded calls run through a component: what pruning measures, and where it cuts."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffoundry.compression.compensation import cut_site
from diffoundry.compression.costs import Cost
from diffoundry.compression.importance import DAMPING, Measure
from diffoundry.compression.merging import merge_heads
from diffoundry.compression.refitting import refit
from diffoundry.compression.statistics import (
    Moments,
    batches_of,
    call_weights,
    gather_moments,
)
from diffoundry.errors import StageError
from diffoundry.models.pruning import Site, SiteKind, find_sites

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

FitTo = Literal["original", "own"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to prune. `ratio` of `cost` leaves; `keep` are patterns of block names left whole;
    `floor` is the share of its units that each block keeps at least. `compensate` fits what stays
    anew, `fit_to` the original's residual stream or the layer's "own" output before the cut; more
    `passes` fit every cut block again, from the first to the last. `merge_heads`: ranked by
    variance, heads that give nearly the same are merged."""

    def merges(self, site: Site) -> bool:
        """Whether heads of the site take over from those that are cut. (Where the rest is
        fitted anew, it does so anyway.)"""
        return self.merge_heads and self.importance == "variance" and site.kind == "heads"

    ratio: float
    cost: Cost = "parameters"
    kinds: tuple[SiteKind, ...] = ("channels", "feed_forward", "heads")
    importance: Measure = "second_order"
    compensate: bool = True
    fit_to: FitTo = "original"
    passes: int = 1
    merge_heads: bool = True
    damping: float = DAMPING
    early: float = 1.0
    keep: tuple[str, ...] = ()
    floor: float = 0.25


def sharing_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters are its own but lie where `module`'s do.

    Cutting and fitting give a layer another tensor and never write into one: each copy costs what
    is cut, not what the whole weighs.
    """
    import torch

    memo = {
        id(one): torch.nn.Parameter(one.detach(), requires_grad=one.requires_grad)
        for one in module.parameters()
    }
    return copy.deepcopy(module, memo)


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


def in_order_of_use(
    module: torch.nn.Module,
    network: torch.nn.Module,
    feeds: Sequence[torch.Tensor],
    sites: Sequence[Site],
) -> list[Site]:
    """The sites as one call reaches their consumers: each is fitted on what came before it.

    One that the call does not reach (the other half of an autoencoder) is left out.
    """
    import torch

    seen: list[str] = []
    hooks = [
        network.get_submodule(site.consumer).register_forward_pre_hook(
            lambda _, __, name=site.name: None if name in seen else seen.append(name)
        )
        for site in sites
    ]
    try:
        with torch.no_grad():
            module(*feeds)
    finally:
        for hook in hooks:
            hook.remove()
    by_name = {site.name: site for site in sites}
    return [by_name[name] for name in seen]


def refuse_degenerate(contract: Contract, calls: Sequence[Call]) -> None:
    """Raises StageError where calls say nothing: none, or all the same."""
    import numpy as np

    if calls and len(calls) > 1:
        first = calls[0]
        if any(
            not np.array_equal(call.feeds[spec.name], first.feeds[spec.name])
            for call in calls[1:]
            for spec in contract.inputs
        ):
            return
    raise StageError(
        f"pruning {contract.component}",
        expected="recorded calls that differ",
        found=f"{len(calls)} calls, all with the same inputs" if calls else "an empty recording",
        remedy="give the profile more, and different, calibration prompts",
    )


class Replay:
    """The calibration calls, and what is done with them to one component."""

    def __init__(
        self,
        network: torch.nn.Module,
        module: torch.nn.Module,
        contract: Contract,
        calls: Sequence[Call],
        settings: Settings,
    ) -> None:
        self.network, self.module, self.contract, self.calls = network, module, contract, calls
        self.settings = settings
        self.weights = call_weights(calls, settings.early)
        self.original: tuple[torch.nn.Module, torch.nn.Module] | None = None

    def keep_original(self) -> None:
        """Keep a copy of the component as it is now, to fit the cut one to."""
        whole = sharing_copy(self.module)
        self.original = whole, network_of(whole)

    def moments(self, sites: Sequence[Site]) -> Iterator[tuple[str, Moments]]:
        """What the sites' consumers read now: as few at once as the budget holds."""
        return gather_moments(self.network, self.module, self.contract, self.calls,
                              [site.consumer for site in sites], self.weights)  # fmt: skip

    def cut(self, site: Site, kept: Sequence[int]) -> None:
        """Cut a site, and let what stays do the work of what is gone."""
        settings = self.settings
        if not settings.compensate:
            if settings.merges(site):
                ((_, moments),) = self.moments([site])
                merge_heads(self.network, site, kept, moments)
            cut_site(self.network, site, kept, None)
        elif self.original is None:
            ((_, moments),) = self.moments([site])
            cut_site(self.network, site, kept, moments, settings.damping)
        else:
            cut_site(self.network, site, kept, None)
            self.refit(site)

    def refit(self, site: Site) -> None:
        """Fit a site's consumer to the original's stream."""
        if self.original is not None:
            refit(self.module, self.network, self.original, self.contract, self.calls,
                  self.weights, site, self.settings.damping)  # fmt: skip


def damage_of(module: torch.nn.Module, contract: Contract, calls: Sequence[Call]) -> float:
    """Mean square error of the outputs over their mean square, worst output, mean of the calls."""
    import torch

    total = 0.0
    for batch in batches_of(contract, calls):
        with torch.no_grad():
            made = module(*batch.inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        errors = [
            (output.double() - wanted.double()).square().flatten(1).mean(1)
            / wanted.double().square().flatten(1).mean(1)
            for output, wanted in zip(outputs, batch.outputs, strict=True)
        ]
        total += float(torch.stack(errors).amax(0).sum())
    return total / sum(len(call.feeds[contract.inputs[0].name]) for call in calls)
