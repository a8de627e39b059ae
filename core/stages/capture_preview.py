"""The capture of a preview decoder: what it makes of the latents that a pipeline's capture made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffoundry.capture.asked import Asked
from diffoundry.errors import StageError
from diffoundry.formats import recording
from diffoundry.formats.recording import Call
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext

if TYPE_CHECKING:
    from diffoundry.capture.reference import Reference
    from diffoundry.formats.recording import Trajectory
    from diffoundry.types import Contract


@dataclass(frozen=True)
class CapturePreview(Asked):
    """Records the PyTorch preview decoder on the final latents of recorded trajectories.

    The latents are the split's (see `Asked`).
    """

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "numpy")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=1 << 30, weights=1.1, activations=4)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        """The decoder's folder, and the trajectories that the pipeline's capture recorded."""
        return {"module": (ArtifactType("torch_module"),), "pipeline": (ArtifactType("recording"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        """The decoder's recording."""
        return {"recording": ArtifactType("recording")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Record. Raises ModelError where the original itself makes NaN or infinity."""
        from diffoundry.capture.recorder import record
        from diffoundry.capture.reference import Reference
        from diffoundry.capture.swaps import Ranges
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic

        contract = context.contract
        if contract is None:
            raise StageError("capture_preview", expected="a component's contract", found="none")
        made = recording.load_pipeline(inputs["pipeline"].path).trajectories
        with deterministic(context.threads):
            module = load_component(inputs["module"].path, contract.component)
            reference = Reference(module, contract)
            calls = [_decode(reference, contract, one) for one in made]
            kept = calls[: self.calls_per_component]
            found = record(reference, kept, calls, self, Ranges(), context.say)
        folder = context.work / "recording"
        recording.save(found, folder)
        return {"recording": Produced(folder)}


def _decode(reference: Reference, contract: Contract, one: Trajectory) -> Call:
    feeds = {contract.inputs[0].name: one.final_latents}
    shape = {axis.name: one.shape[axis.name] for axis in contract.axes}
    return Call(feeds, reference.infer(feeds), shape, one.prompt)
