"""Chooses which layers of a quantization plan stay in float, so that a drift budget holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffoundry.errors import StageError
from diffoundry.formats import quant_plan, recording, sensitivity
from diffoundry.types import Artifact, ArtifactType, Produced, StageContext

MARGIN_DB = 0.5
"""How much better than the budget the plan is made on the tuning split: the check reads another."""


@dataclass(frozen=True)
class ChoosePrecision:
    """Stage: torch_module, quant_plan, tuning recording -> quant_plan, sensitivity.

    drift_budget_db: SQNR of the component's output that must be left (the planner fills in what the
    profile's [limits.drift] or --drift-budget says; None: nothing is held). measure: "needed" looks
    at single layers only where the plan as it came breaks the budget, "always" in any case.
    cost: what integer kernels save, "multiply_adds" (the same on every host) or "seconds" (measured
    here). calls: of the tuning recording, spread evenly. max_float_share: of the cost.
    """

    drift_budget_db: float | None = None
    measure: Literal["needed", "always"] = "needed"
    cost: Literal["multiply_adds", "seconds"] = "multiply_adds"
    calls: int = 8
    max_float_share: float = 0.5

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy",
                                        "scikit-image")  # fmt: skip
    extra: ClassVar[str] = "build"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "plan": (ArtifactType(quant_plan.KIND),),
            "tuning": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {
            "table": ArtifactType(sensitivity.KIND),
            "plan": ArtifactType(quant_plan.KIND),
        }

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Choose. Raises StageError where the budget cannot be met; resumes from the journal."""
        from diffoundry.compression.budget import fit
        from diffoundry.compression.sensitivity import Bench, measure_layers
        from diffoundry.formats.recording import spread
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("choose_precision", expected="a component", found="none")
        calls = recording.load_component(inputs["tuning"].path).calls
        if not calls:
            raise StageError(f"choose_precision: {component}", expected="recorded tuning calls",
                             found="none")  # fmt: skip
        plan = quant_plan.load(inputs["plan"].path)
        module = load_component(inputs["module"].path, component)
        with deterministic(context.threads):
            bench = Bench(module, contract, spread(calls, self.calls))
            whole = reached = bench.sqnr_db(plan)
            budget = None if self.drift_budget_db is None else self.drift_budget_db + MARGIN_DB
            broken = budget is not None and whole < budget
            context.say(f"{component}: {whole:.1f} dB on the tuning split")
            rows: tuple[sensitivity.Row, ...] = ()
            reverted: tuple[str, ...] = ()
            if broken or self.measure == "always":
                rows = measure_layers(bench, plan, self.cost, context.journal, context.say)
            if broken and budget is not None:
                fitted = fit(plan, rows, budget, self.max_float_share, bench.sqnr_db, context.say)
                plan, reached, reverted = fitted.plan, fitted.reached_db, fitted.reverted
        table = sensitivity.Sensitivity(
            component,
            rows,
            whole_db=round(whole, 3),
            reached_db=round(reached, 3),
            budget_db=self.drift_budget_db,
            reverted=reverted,
            settings=dataclasses.asdict(self),
        )
        sensitivity.save(context.work / "table", table)
        quant_plan.save(context.work / "plan", plan)
        return {"table": Produced(context.work / "table"), "plan": Produced(context.work / "plan")}
