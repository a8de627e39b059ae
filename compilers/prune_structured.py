"""Cuts units out of a component, so that its tensors are really smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffoundry.errors import StageError
from diffoundry.formats import prune_record, recording, torch_module
from diffoundry.models.surgery import Prune, read_surgery, write_surgery
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

if TYPE_CHECKING:
    import torch

    from diffoundry.compression.pruning import Cut, Pruned, Settings

OPERATIONS: Mapping[str, Literal["prune_channels", "prune_feed_forward", "prune_heads"]] = {
    "channels": "prune_channels",
    "feed_forward": "prune_feed_forward",
    "heads": "prune_heads",
}


@dataclass(frozen=True)
class PruneStructured:
    """Stage: torch_module, recordings -> a smaller torch_module, and the record of what went.

    ratio: the share of `cost` ("parameters" or "multiply_adds") that leaves the component.
    kinds: what may be cut: channels (between a resnet block's convolutions), feed_forward (inner
    channels), heads. importance: "second_order" (Optimal Brain Surgeon on recorded activations),
    "variance" or "l1". compensate: fit the surviving weights anew by least squares. damping, early:
    of the second moments, and how much more the noisiest step counts. keep: patterns of block
    names to leave whole. floor: share of its units that each block keeps at least.
    recover_steps, recover_rate: a short distillation from the original on the calibration calls.
    """

    ratio: float = 0.15
    cost: Literal["parameters", "multiply_adds"] = "parameters"
    kinds: tuple[str, ...] = ("channels", "feed_forward", "heads")
    importance: Literal["second_order", "variance", "l1"] = "second_order"
    compensate: bool = True
    damping: float = 0.01
    early: float = 1.0
    keep: tuple[str, ...] = ()
    floor: float = 0.25
    recover_steps: int = 0
    recover_rate: float = 1e-4

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
        """Prune. Raises StageError for a ratio that cannot be reached, or too few recordings."""
        import torch

        from diffoundry.compression.pruning import prune
        from diffoundry.compression.recovery import recover
        from diffoundry.models.components import load_component

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
        pruned = prune(module, contract, calibration.calls, tuning.calls, settings, context.say)
        loss = None
        if self.recover_steps:
            loss = recover(module, contract, calibration.calls, self.recover_steps,
                           self.recover_rate, say=context.say)  # fmt: skip
        folder = context.work / "module"
        write_pruned(folder, source, module, pruned.cuts)
        self._write_record(context.work / "record", pruned, loss)
        return {"module": Produced(folder), "record": Produced(context.work / "record")}

    def _settings(self, component: str) -> Settings:
        from diffoundry.compression.pruning import Settings

        unknown = sorted(set(self.kinds) - OPERATIONS.keys())
        if unknown or not 0 < self.ratio < 1 or not 0 < self.floor <= 1:
            raise StageError(
                f"prune_structured: {component}",
                expected=f"kinds among {', '.join(OPERATIONS)}; ratio and floor between 0 and 1",
                found=f"kinds {', '.join(self.kinds)}; ratio {self.ratio}; floor {self.floor}",
                remedy="correct the stage's options in the profile",
            )
        own = dataclasses.asdict(self)
        names = {field.name for field in dataclasses.fields(Settings)}
        return Settings(**{name: value for name, value in own.items() if name in names})

    def _write_record(self, folder: Path, pruned: Pruned, loss: float | None) -> None:
        prune_record.save(
            folder,
            {
                "settings": dataclasses.asdict(self),
                "sites": [
                    {
                        "kind": one.site.kind,
                        "module": one.site.module,
                        "units": one.site.units,
                        "kept": len(one.kept),
                        "damage": float(f"{one.damage:.4g}"),
                    }
                    for one in pruned.cuts
                ],
                "parameters": {"before": pruned.parameters[0], "after": pruned.parameters[1]},
                "multiply_adds": {
                    "before": pruned.multiply_adds[0],
                    "after": pruned.multiply_adds[1],
                },
                "recovery": None if loss is None else {"loss": float(f"{loss:.4g}")},
            },
        )


def write_pruned(
    folder: Path, source: Path, module: torch.nn.Module, cuts: tuple[Cut, ...]
) -> None:
    """The pruned component as a folder: config, smaller safetensors, surgery.json.

    Tensors that the component does not use (the other half of an autoencoder) are copied.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from diffoundry.compression.pruning import network_of
    from diffoundry.models.weights import names_in_files

    folder.mkdir(parents=True)
    state: dict[str, Any] = network_of(module).state_dict()
    names = {in_file: name for name, in_file in names_in_files(source, state).items()}
    tensors = {}
    for path in torch_module.find_weights(source):
        with safe_open(path, framework="pt") as file:
            for in_file in file.keys():  # noqa: SIM118 (not a dict)
                name = names.get(in_file, in_file)
                value = state[name] if name in state else file.get_tensor(in_file)
                tensors[name] = value.detach().contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = torch_module.model_file(source, torch_module.CONFIG).read_bytes()
    (folder / torch_module.CONFIG).write_bytes(config)
    added = [
        Prune(
            operation=OPERATIONS[one.site.kind],
            module=one.site.module,
            units=one.site.units,
            kept=one.kept,
        )
        for one in cuts
    ]
    write_surgery(folder, [*read_surgery(source), *added])
