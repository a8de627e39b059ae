"""The simulation stage: the compressed component, in PyTorch, on the calls that checks replay."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.errors import StageError
from diffoundry.formats import quant_plan, recording, simulation
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext


@dataclass(frozen=True)
class Simulate:
    """Stage: torch_module (and quant_plan, where `planned`), recording -> simulation.

    Weights and activations on the plan's grids, computed in float32: what a faithful engine of
    the plan comes to, whatever its kernels round by the way.
    """

    planned: bool = False

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=1 << 30, weights=1.35, activations=4)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        plan = {"plan": (ArtifactType(quant_plan.KIND),)} if self.planned else {}
        return {
            "module": (ArtifactType("torch_module"),),
            **plan,
            "recording": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"simulation": ArtifactType(simulation.KIND)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Replay every call. Raises ModelError where a value is not finite, ArtifactError for a
        plan of another model."""
        from diffoundry.capture.reference import Reference
        from diffoundry.compression.simulator import simulated
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("simulate", expected="a component", found="none")
        recorded = recording.load_component(inputs["recording"].path)
        module = load_component(inputs["module"].path, component)
        plan = quant_plan.load(inputs["plan"].path) if self.planned else None
        context.say(f"{component}: the compressed original on {len(recorded.calls)} calls")
        with deterministic(context.threads), contextlib.ExitStack() as stack:
            if plan is not None:
                stack.enter_context(simulated(module, plan))
            reference = Reference(module, contract)
            made = simulation.Simulation(
                recording_digest=inputs["recording"].digest,
                calls=tuple(reference.infer(call.feeds) for call in recorded.calls),
                shape_calls=tuple(reference.infer(call.feeds) for call in recorded.shape_calls),
            )
        folder = context.work / "simulation"
        simulation.save(made, folder)
        return {"simulation": Produced(folder)}
