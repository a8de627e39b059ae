"""Leaves a component's weights few values, which formats with lookup tables store in few bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffoundry.errors import StageError
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

if TYPE_CHECKING:
    import torch

BITS = (1, 2, 4, 6, 8)
"""Sizes of an index that Core ML reads since iOS 16."""


@dataclass(frozen=True)
class PalettizeWeights:
    """Stage: torch_module -> torch_module whose convolutions, linear layers and embedding tables
    have at most 2^bits distinct weights.

    group: 0 gives each tensor one table; else every so many output channels have their own (Core
    ML: iOS 18 or newer). keep: patterns of layer names to leave as they are. min_elements: smaller
    tensors stay too.
    """

    bits: int = 6
    group: int = 0
    keep: tuple[str, ...] = ()
    min_elements: int = 2048

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"module": (ArtifactType("torch_module"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"module": ArtifactType("torch_module", "fp32")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Cluster and write. Raises StageError for options that nobody can mean, and for a `keep`
        that leaves nothing."""
        from diffoundry.compression.pruning import network_of
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic
        from diffoundry.models.rewriting import write_rewritten

        component = context.component
        if component is None:
            raise StageError("palettize_weights", expected="a component", found="none")
        self._check(component)
        source = inputs["module"].path
        module = load_component(source, component)
        with deterministic(context.threads):
            changed = palettize(module, self.bits, self.group, self.keep, self.min_elements)
        if not changed:
            raise StageError(
                f"palettize_weights: {component}",
                expected=f"a layer of at least {self.min_elements} weights that is not kept",
                found=f"none (keep: {', '.join(self.keep) or 'nothing'})",
                remedy="leave this stage out of the component's route, or keep less",
            )
        context.say(f"{component}: {len(changed)} layers on tables of {2**self.bits} values")
        folder = context.work / "module"
        write_rewritten(folder, source, network_of(module))
        return {"module": Produced(folder)}

    def _check(self, component: str) -> None:
        if self.bits not in BITS or self.group < 0 or self.min_elements < 1:
            raise StageError(
                f"palettize_weights: {component}",
                expected=f"bits among {', '.join(map(str, BITS))}; group 0 or more; min_elements "
                "1 or more",
                found=f"bits {self.bits}; group {self.group}; min_elements {self.min_elements}",
                remedy="correct the stage's options in the profile",
            )


def palettize(
    module: torch.nn.Module, bits: int, group: int, keep: tuple[str, ...], min_elements: int
) -> list[str]:
    """Cluster the weights of `module` in place; the names of the layers."""
    import torch

    from diffoundry.compression.layers import find_layers
    from diffoundry.compression.palettes import palettized

    layers = dict(module.named_modules())
    changed = []
    for name in find_layers(module):
        weight = layers[name].weight
        assert isinstance(weight, torch.Tensor)
        kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
        if weight.numel() >= min_elements and not kept:
            with torch.no_grad():
                weight.copy_(torch.from_numpy(palettized(weight.detach().numpy(), bits, group)))
            changed.append(name)
    return changed
