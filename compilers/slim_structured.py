"""Orders a component's units by importance: its first units alone are a narrower component."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from diffoundry.errors import StageError
from diffoundry.formats import prune_record, recording
from diffoundry.models.pruning import SiteKind
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

KINDS: tuple[SiteKind, ...] = ("channels", "feed_forward", "heads")


@dataclass(frozen=True)
class SlimStructured:
    """Stage: torch_module, recordings -> the same network with its prunable units in order.

    slim_width cuts the narrower networks out of it. kinds, importance, damping, early, keep: as
    prune_structured's. compensate: fit the shared weights to all `widths` together by least
    squares; recover_steps: then distil them together from the original. Both read the calibration
    calls and change the full width a little; without them it stays the same function.
    The record's "recovery" holds, by width, what the outputs lose on the tuning calls (mean square
    error over mean square).
    """

    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    kinds: tuple[SiteKind, ...] = KINDS
    importance: Literal["second_order", "variance", "l1"] = "second_order"
    damping: float = 0.01
    early: float = 1.0
    keep: tuple[str, ...] = ()
    compensate: bool = False
    recover_steps: int = 0
    recover_rate: float = 3e-4

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "calibration": (ArtifactType("recording"),),
            "tuning": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {
            "record": ArtifactType(prune_record.KIND),
            "module": ArtifactType("torch_module", "fp32"),
        }

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Order. Raises StageError for wrong options, or recordings that say nothing."""
        import torch

        from diffoundry.compression.pruning import Settings, network_of, rank_sites
        from diffoundry.compression.slimming import (
            distil,
            fit_widths,
            losses_by_width,
            order_units,
        )
        from diffoundry.models.components import load_component
        from diffoundry.models.rewriting import write_rewritten

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("slim_structured", expected="a component", found="none")
        self._check(component)
        torch.set_num_threads(context.threads)
        calibration = recording.load_component(inputs["calibration"].path).calls
        tuning = recording.load_component(inputs["tuning"].path).calls
        source = inputs["module"].path
        module = load_component(source, component)
        settings = Settings(
            0.5, kinds=self.kinds, importance=self.importance, compensate=False,
            merge_heads=False, damping=self.damping, early=self.early, keep=self.keep,
        )  # fmt: skip
        rankings = rank_sites(module, contract, calibration, settings, context.say)
        sites = [one.site for one in rankings]
        order_units(network_of(module), rankings)
        if self.compensate:
            fit_widths(module, sites, self.widths, contract, calibration, self.early,
                       self.damping, context.say)  # fmt: skip
        loss = None
        if self.recover_steps:
            loss = distil(module, sites, self.widths, contract, calibration,
                          self.recover_steps, self.recover_rate, context.say)  # fmt: skip
        folder = context.work / "module"
        write_rewritten(folder, source, network_of(module))
        losses = losses_by_width(module, sites, self.widths, contract, tuning)
        self._write_record(context.work / "record", module, contract, calibration, loss, losses)
        return {"module": Produced(folder), "record": Produced(context.work / "record")}

    def _check(self, component: str) -> None:
        wrong = set(self.kinds) - set(KINDS) or any(not 0 < width <= 1 for width in self.widths)
        if wrong or not self.widths:
            raise StageError(
                f"slim_structured: {component}",
                expected=f"kinds among {', '.join(KINDS)}; widths above 0, up to 1",
                found=f"kinds {', '.join(self.kinds)}; widths {self.widths}",
                remedy="correct the stage's options in the profile",
            )

    def _write_record(
        self,
        folder: Path,
        module: torch.nn.Module,
        contract: Contract,
        calls: Sequence[Call],
        loss: float | None,
        losses: Mapping[float, float],
    ) -> None:
        from diffoundry.compression.costs import count_multiply_adds, count_parameters
        from diffoundry.compression.statistics import feeds_of

        parameters = count_parameters(module)
        feeds = feeds_of(contract, calls[0].feeds)
        adds = sum(count_multiply_adds(module, feeds).values())
        prune_record.save(
            folder,
            {
                "settings": dataclasses.asdict(self),
                "sites": [],
                "parameters": {"before": parameters, "after": parameters},
                "multiply_adds": {"before": adds, "after": adds},
                "recovery": {
                    "loss": None if loss is None else float(f"{loss:.4g}"),
                    "widths": {f"{w:g}": float(f"{one:.4g}") for w, one in losses.items()},
                },
            },
        )
