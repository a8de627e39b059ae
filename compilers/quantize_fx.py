"""Estimates a quantization plan with torch.fx's graph mode (PT2E observers)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.compression.estimating import (
    PlanSettings,
    check_calls,
    check_settings,
    complete,
    draft,
    with_outputs,
)
from diffoundry.errors import StageError
from diffoundry.formats import exported_program, quant_plan, recording
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext


@dataclass(frozen=True)
class QuantizeFx(PlanSettings):
    """Stage: torch_module, exported_program, recording -> quant_plan.

    conv, linear, embedding: the scheme of each kind of layer (static, dynamic, weight_only, float).
    keep: patterns of layer names whose activations stay in float, their weights INT8. in_float:
    patterns of layers that are not touched. ranges: minmax, percentile or mse, of activations;
    weight_ranges: minmax or mse. symmetric: grids with their zero in the middle (TensorRT).
    quantize_outputs: kinds of layers whose output is put on a grid too (for runtimes whose integer
    kernels write integers). outputs_of: patterns of layers whose output is, whatever their kind,
    with zero in the grid's middle: `*attn1.to_q` and `*attn1.to_k` make OpenVINO multiply integers
    where queries meet keys. bias_correction: see `corrected_bias`. max_multiply_adds: of all
    calls that are looked at; where one costs much, fewer are, evenly spread (16 of Stable
    Diffusion's U-Net at 512 × 512: each brings millions of values to every layer).
    """

    max_multiply_adds: float = 6e12

    tools: ClassVar[tuple[str, ...]] = ("torch", "torchao", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build,quantize"
    memory: ClassVar[Memory] = Memory(libraries=850 << 20, weights=1.1, activations=2)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "program": (ArtifactType("exported_program"),),
            "calibration": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"plan": ArtifactType(quant_plan.KIND)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Watch and plan. Raises StageError for a calibration set that will not do, or values
        that are not finite."""
        from diffoundry.compression.fx_observing import Watching, watch_layers
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("quantize_fx", expected="a component", found="none")
        where = f"quantize_fx: {component}"
        check_settings(self, where)
        calls = recording.load_component(inputs["calibration"].path).calls
        check_calls(calls, where)
        # Weights are held once: those of the traced program.
        layers = draft(load_component(inputs["module"].path, component), self)
        watched = {layer.module: layer.kind for layer in layers if layer.scheme == "static"}
        how = Watching(with_outputs(layers, self), self.bias_correction, self.max_multiply_adds)
        context.say(f"{component}: ranges of {len(watched)} layers on {len(calls)} calls")
        with deterministic(context.threads):
            program = exported_program.load(inputs["program"].path)
            taken, given = watch_layers(program, contract, calls, watched, how, context.say)
        plan = complete(program.state_dict, component, "quantize_fx", self, layers, taken, given)
        folder = context.work / "plan"
        quant_plan.save(folder, plan)
        return {"plan": Produced(folder)}
