"""Cuts units out of a component, so that its tensors are really smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from diffoundry.errors import StageError
from diffoundry.formats import prune_record, recording
from diffoundry.formats.smaller_calls import cut, is_large, smaller_shape
from diffoundry.types import Artifact, ArtifactType, Contract, Memory, Produced, StageContext

if TYPE_CHECKING:
    from torch import nn

    from diffoundry.compression.pruning import Pruned, Settings
    from diffoundry.compression.recovery import Recovery

KINDS = ("channels", "feed_forward", "heads")
LARGE_CALLS = 2
"""Calls of each split that a large component is pruned by."""


@dataclass(frozen=True)
class PruneStructured:
    """Stage: torch_module, recordings -> a smaller torch_module, and the record of what went.

    ratio: the share of `cost` ("parameters" or "multiply_adds") that leaves the component.
    kinds: what may be cut: channels (between a resnet block's convolutions), feed_forward (inner
    channels), heads. importance: "second_order" (Optimal Brain Surgeon on recorded activations),
    "variance" or "l1". compensate: fit the surviving weights anew by least squares, so that the
    residual stream after the block is the original's again (fit_to "original"), or so that the
    layer gives what it gave on its own inputs ("own"); passes: how often all cut blocks are fitted,
    first to last. merge_heads: with "variance", heads that give nearly the same become one.
    damping, early: of the second moments, and how much more the noisiest step counts.
    keep: patterns of block names to leave whole. floor: share of its units that each block keeps
    at least.
    recover_steps, recover_rate: a short distillation from the original on the calibration calls,
    kept only where the tuning calls show that it helped. Of a large component the calls are few,
    and cut to a smaller picture (see formats.smaller_calls).
    """

    ratio: float = 0.15
    cost: Literal["parameters", "multiply_adds"] = "parameters"
    kinds: tuple[str, ...] = KINDS
    importance: Literal["second_order", "variance", "l1"] = "second_order"
    compensate: bool = True
    fit_to: Literal["original", "own"] = "original"
    passes: int = 1
    merge_heads: bool = True
    damping: float = 0.01
    early: float = 1.0
    keep: tuple[str, ...] = ()
    floor: float = 0.25
    recover_steps: int = 0
    recover_rate: float = 1e-4

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=1200 << 20, weights=2, activations=4)

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
        """Prune. Raises StageError for a ratio that cannot be reached, or too few recordings."""
        import torch

        from diffoundry.compression.pruning import network_of, prune
        from diffoundry.compression.records import operation_of
        from diffoundry.compression.recovery import recover_if_better
        from diffoundry.models.components import load_component
        from diffoundry.models.rewriting import write_rewritten

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("prune_structured", expected="a component", found="none")
        settings = self._settings(component)
        torch.set_num_threads(context.threads)
        calibration = recording.load_component(inputs["calibration"].path)
        tuning = recording.load_component(inputs["tuning"].path)
        if not calibration.calls or not tuning.calls:
            raise StageError(f"prune_structured: {component}", found="an empty recording",
                             expected="recorded calls of both splits")  # fmt: skip
        source = inputs["module"].path
        module = load_component(source, component)
        calls, judged = calibration.calls, tuning.calls
        if is_large(sum(p.numel() for p in module.parameters()), contract, calls[0].feeds):
            context.say(f"{component}: calls are cut to a smaller picture, {LARGE_CALLS} are taken")
            calls, judged = (cut_calls(module, contract, c, LARGE_CALLS) for c in (calls, judged))
        pruned = prune(module, contract, calls, judged, settings, context.say)
        recovery = None
        if self.recover_steps:
            recovery = recover_if_better(module, contract, calls, judged,
                                         self.recover_steps, self.recover_rate,
                                         context.say)  # fmt: skip
        folder = context.work / "module"
        operations = [operation_of(one.site, one.kept) for one in pruned.cuts]
        write_rewritten(folder, source, network_of(module), operations=operations)
        self._write_record(context.work / "record", pruned, recovery)
        return {"module": Produced(folder), "record": Produced(context.work / "record")}

    def _settings(self, component: str) -> Settings:
        from diffoundry.compression.pruning import Settings

        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not 0 < self.ratio < 1 or not 0 < self.floor <= 1:
            raise StageError(
                f"prune_structured: {component}",
                expected=f"kinds among {', '.join(KINDS)}; ratio and floor between 0 and 1",
                found=f"kinds {', '.join(self.kinds)}; ratio {self.ratio}; floor {self.floor}",
                remedy="correct the stage's options in the profile",
            )
        own = dataclasses.asdict(self)
        names = {field.name for field in dataclasses.fields(Settings)}
        return Settings(**{name: value for name, value in own.items() if name in names})

    def _write_record(self, folder: Path, pruned: Pruned, recovery: Recovery | None) -> None:
        from diffoundry.compression.records import record_of

        prune_record.save(
            folder,
            {
                "settings": dataclasses.asdict(self),
                "sites": [record_of(one) for one in pruned.cuts],
                "parameters": {"before": pruned.parameters[0], "after": pruned.parameters[1]},
                "multiply_adds": {
                    "before": pruned.multiply_adds[0],
                    "after": pruned.multiply_adds[1],
                },
                "recovery": None
                if recovery is None
                else {
                    name: value if isinstance(value, bool) else float(f"{value:.4g}")
                    for name, value in dataclasses.asdict(recovery).items()
                },
            },
        )


def cut_calls(
    module: nn.Module, contract: Contract, calls: Sequence[recording.Call], count: int
) -> tuple[recording.Call, ...]:
    """`count` of the calls on a smaller picture, with what the module answers there."""
    import torch

    found = []
    for call in recording.spread(calls, count):
        shape = smaller_shape(contract, contract.check_feeds(call.feeds))
        feeds = cut(call.feeds, contract, shape)
        with torch.no_grad():
            made = module(*(torch.from_numpy(feeds[spec.name]) for spec in contract.inputs))
        outputs = made if isinstance(made, tuple) else (made,)
        arrays = {
            spec.name: value.numpy() for spec, value in zip(contract.outputs, outputs, strict=True)
        }
        found.append(recording.Call(feeds, arrays, shape, call.prompt))
    return tuple(found)
