"""Puts layers whose input has two ranges in two parts, each quantized with its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.errors import StageError
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext


@dataclass(frozen=True)
class SplitForQuantization:
    """Stage: torch_module -> torch_module that computes the same, and says so in surgery.json.

    skip_concat: `conv_shortcut` of the upward half reads cat(hidden, skip): two convolutions whose
    results are added. As `*.conv_shortcut.first` and `.second` they are no longer on the keep-list.
    bos_token: the first token of keys and values in cross-attention goes through a linear layer of
    its own (`*.first_token`, on the keep-list: weights INT8, activations in float). Prune before,
    not after.
    """

    skip_concat: bool = True
    bos_token: bool = True

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers")
    extra: ClassVar[str] = "build"
    exact: ClassVar[bool] = True

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"module": (ArtifactType("torch_module"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"module": ArtifactType("torch_module", "fp32")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Split. Raises StageError where the component has nothing of the kind."""
        from diffoundry.compression.pruning import network_of
        from diffoundry.compression.splitting import skip_convolutions, token_layers, write_split
        from diffoundry.models.components import load_component
        from diffoundry.models.surgery import Operation, SplitConvolution, SplitFirstToken

        component = context.component
        if component is None:
            raise StageError("split_for_quantization", expected="a component", found="none")
        source = inputs["module"].path
        network = network_of(load_component(source, component))
        made: dict[str, Operation] = {}
        if self.skip_concat:
            for name, channels in skip_convolutions(network).items():
                made[name] = SplitConvolution(
                    operation="split_convolution", module=name, channels=channels
                )
        if self.bos_token:
            for name in token_layers(network):
                made[name] = SplitFirstToken(operation="split_first_token", module=name)
        if not made:
            raise StageError(
                f"split_for_quantization: {component}",
                expected="skip concatenations or cross-attention, and an option that wants them",
                found="none",
                remedy="leave this stage out of the component's route",
            )
        context.say(f"{component}: {len(made)} layers in two parts")
        folder = context.work / "module"
        write_split(folder, source, network, made)
        return {"module": Produced(folder)}
