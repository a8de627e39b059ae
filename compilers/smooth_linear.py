"""Moves what is hard to quantize in inputs of linear layers into their weights (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.compression.estimating import check_calls
from diffoundry.errors import StageError
from diffoundry.formats import recording
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext


@dataclass(frozen=True)
class SmoothLinear:
    """Stage: torch_module, recording -> torch_module that computes the same to rounding.

    alpha: 0 leaves ranges of activations as they are, 1 makes them equal at the weights' expense.
    """

    alpha: float = 0.5

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"
    exact: ClassVar[bool] = True

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "calibration": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"module": ArtifactType("torch_module", "fp32")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Smooth. Raises StageError for a calibration set that will not do, or a component
        without linear layers behind a norm."""
        from diffoundry.compression.pruning import network_of
        from diffoundry.compression.smoothing import find_folds, largest_inputs, smooth
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic
        from diffoundry.models.rewriting import write_rewritten

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("smooth_linear", expected="a component", found="none")
        where = f"smooth_linear: {component}"
        if not 0 <= self.alpha <= 1:
            raise StageError(where, expected="alpha between 0 and 1", found=str(self.alpha),
                             remedy="correct the stage's options in the profile")  # fmt: skip
        calls = recording.load_component(inputs["calibration"].path).calls
        check_calls(calls, where)
        source = inputs["module"].path
        module = load_component(source, component)
        network = network_of(module)
        folds = find_folds(network)
        if not folds:
            raise StageError(where, expected="linear layers behind a norm", found="none",
                             remedy="leave this stage out of the component's route")  # fmt: skip
        with deterministic(context.threads):
            layers = [fold.consumers[0] for fold in folds]
            largest = largest_inputs(network, module, contract, calls, layers)
            smooth(network, folds, largest, self.alpha)
        context.say(f"{component}: {len(folds)} scales moved into what makes the input")
        folder = context.work / "module"
        write_rewritten(folder, source, network)
        return {"module": Produced(folder)}
