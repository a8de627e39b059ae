"""Puts convolutions behind a doubling of the plane in four smaller ones that read it undoubled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.errors import StageError
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext


@dataclass(frozen=True)
class SplitUpsampling:
    """Stage: torch_module -> torch_module that computes the same, and says so in surgery.json.

    A plane whose pixels were repeated to 2 x 2 holds each value four times. `upsamplers.0.conv`,
    3 x 3, becomes four of 2 x 2 (`.even_even` to `.odd_odd`: of which rows and columns), and 36
    products become 16. `fuse_onnx` does more than that for onnxruntime in fp32: this is for INT8,
    and for runtimes that it does not serve. Prune before, not after.
    min_channels: of the smaller plane. Narrower ones stay, as putting the four together again costs
    them what is saved (docs/compression/int8-real-size.md); where nothing else is there, the module
    stays as it was.
    """

    min_channels: int = 128

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers")
    extra: ClassVar[str] = "build"
    exact: ClassVar[bool] = True
    memory: ClassVar[Memory] = Memory(libraries=850 << 20, weights=1.1, activations=0)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"module": (ArtifactType("torch_module"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"module": ArtifactType("torch_module", "fp32")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Split what is wide enough, say how much that was."""
        from diffoundry.compression.pruning import network_of
        from diffoundry.compression.splitting import write_split
        from diffoundry.models.components import load_component
        from diffoundry.models.splits import doubling_convolutions
        from diffoundry.models.surgery import Operation, SplitDoubling

        component = context.component
        if component is None:
            raise StageError("split_upsampling", expected="a component", found="none")
        source = inputs["module"].path
        network = network_of(load_component(source, component))
        found = doubling_convolutions(network)
        made: dict[str, Operation] = {
            name: SplitDoubling(operation="split_doubling", module=name)
            for name in found
            if network.get_submodule(name).in_channels >= self.min_channels
        }
        # Shipped profiles have this stage for every model: one without such layers is no error.
        context.say(
            f"{component}: {len(made)} of {len(found)} convolutions behind a doubling in four parts"
            + (f": none has {self.min_channels} channels" if found and not made else "")
        )
        folder = context.work / "module"
        write_split(folder, source, network, made)
        return {"module": Produced(folder)}
