"""Cuts one width out of a component whose units stand in the order of their importance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.errors import StageError
from diffoundry.formats import prune_record, recording
from diffoundry.models.pruning import SiteKind
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

KINDS: tuple[SiteKind, ...] = ("channels", "feed_forward", "heads")


@dataclass(frozen=True)
class SlimWidth:
    """Stage: torch_module (of slim_structured) -> the first `width` share of the units of every
    site, and the record of it. A site's share is rounded up.

    kinds, keep: those of slim_structured. The tuning calls tell what the width costs: the record's
    "recovery" holds the mean square error of the outputs over their mean square.
    """

    width: float = 1.0
    kinds: tuple[SiteKind, ...] = KINDS
    keep: tuple[str, ...] = ()

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "tuning": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {
            "record": ArtifactType(prune_record.KIND),
            "module": ArtifactType("torch_module", "fp32"),
        }

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Cut. Raises StageError for a width that is none."""
        import torch

        from diffoundry.compression.costs import count_multiply_adds, count_parameters
        from diffoundry.compression.pruning import Cut
        from diffoundry.compression.records import operation_of, record_of
        from diffoundry.compression.replaying import (
            Settings,
            choose_sites,
            damage_of,
            in_order_of_use,
            network_of,
        )
        from diffoundry.compression.slimming import narrow, prefix
        from diffoundry.compression.statistics import feeds_of
        from diffoundry.models.components import load_component
        from diffoundry.models.rewriting import write_rewritten

        component, contract = context.component, context.contract
        if component is None or contract is None or not 0 < self.width <= 1:
            raise StageError(
                f"slim_width: {component}",
                expected="a component, and a width above 0, up to 1",
                found=f"width {self.width}",
                remedy="correct the stage's options in the profile",
            )
        torch.set_num_threads(context.threads)
        calls = recording.load_component(inputs["tuning"].path).calls
        if not calls:
            raise StageError(f"slim_width: {component}", found="an empty recording",
                             expected="recorded calls of the tuning split")  # fmt: skip
        source = inputs["module"].path
        module = load_component(source, component)
        network, feeds = network_of(module), feeds_of(contract, calls[0].feeds)

        def costs() -> tuple[int, int]:
            return count_parameters(module), sum(count_multiply_adds(module, feeds).values())

        before = costs()
        wanted = choose_sites(network, Settings(0.5, kinds=self.kinds, keep=self.keep))
        sites = [
            site
            for site in in_order_of_use(module, network, feeds, wanted)
            if len(prefix(site, self.width)) < site.units
        ]
        narrow(network, sites, self.width)
        after = costs()
        damage = damage_of(module, contract, calls)
        cuts = [Cut(site, prefix(site, self.width), damage) for site in sites]
        operations = [operation_of(one.site, one.kept) for one in cuts]
        folder = context.work / "module"
        write_rewritten(folder, source, network_of(module), operations=operations)
        prune_record.save(
            context.work / "record",
            {
                "settings": dataclasses.asdict(self),
                "sites": [record_of(one) for one in cuts],
                "parameters": {"before": before[0], "after": after[0]},
                "multiply_adds": {"before": before[1], "after": after[1]},
                "recovery": {"widths": {f"{self.width:g}": float(f"{damage:.4g}")}},
            },
        )
        return {"module": Produced(folder), "record": Produced(context.work / "record")}
