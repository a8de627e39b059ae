"""A short distillation from the original with the plan's rounding in the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffoundry.compression.estimating import check_calls
from diffoundry.errors import StageError
from diffoundry.formats import quant_plan, recording
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

_HELD_OUT = 8


@dataclass(frozen=True)
class RecoverQuantized:
    """Stage: torch_module, quant_plan, recordings -> torch_module, quant_plan.

    The module's weights are trained so that it answers the calibration calls under the plan as the
    original did; the plan gets the weight scales that go with them. steps of `batch` calls each;
    rate: AdamW's, falling to zero. Where the tuning calls show no gain, both stay as they came.
    """

    steps: int = 200
    rate: float = 3e-5
    batch: int = 8

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "plan": (ArtifactType(quant_plan.KIND),),
            "calibration": (ArtifactType("recording"),),
            "tuning": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {
            "module": ArtifactType("torch_module", "fp32"),
            "plan": ArtifactType(quant_plan.KIND),
        }

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Train. Raises StageError for options or a calibration set that will not do,
        ArtifactError for a plan of another model."""
        import torch

        from diffoundry.compression.distilling import recover_quantized
        from diffoundry.compression.pruning import network_of
        from diffoundry.compression.sensitivity import Bench
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic
        from diffoundry.models.rewriting import write_rewritten

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("recover_quantized", expected="a component", found="none")
        where = f"recover_quantized: {component}"
        if self.steps < 1 or self.batch < 1 or self.rate <= 0:
            raise StageError(where, expected="steps, batch and rate above 0", found=repr(self),
                             remedy="correct the stage's options in the profile")  # fmt: skip
        calls = recording.load_component(inputs["calibration"].path).calls
        check_calls(calls, where)
        tuning = recording.load_component(inputs["tuning"].path).calls
        if not tuning:
            raise StageError(where, expected="recorded tuning calls", found="none")
        came = quant_plan.load(inputs["plan"].path)
        source = inputs["module"].path
        module = load_component(source, component)
        with deterministic(context.threads), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            bench = Bench(module, contract, recording.spread(tuning, _HELD_OUT))
            before_db = bench.sqnr_db(came)
            plan, loss = recover_quantized(module, came, contract, calls, self.steps, self.rate,
                                           self.batch, context.say)  # fmt: skip
        if not all(bool(torch.isfinite(value).all()) for value in module.parameters()):
            raise StageError(where, expected="finite weights after training", found="others",
                             remedy="train with a smaller rate")  # fmt: skip
        after_db = bench.sqnr_db(plan)
        said = f"{before_db:.2f} -> {after_db:.2f} dB on the tuning calls, loss {loss:.2e}"
        if not after_db > before_db:
            module, plan, said = load_component(source, component), came, f"{said}: not kept"
        context.say(f"{component}: {said}")
        write_rewritten(context.work / "module", source, network_of(module))
        quant_plan.save(context.work / "plan", plan)
        return {
            "module": Produced(context.work / "module"),
            "plan": Produced(context.work / "plan"),
        }
