"""Chooses which layers of a quantization plan stay in float, so that a drift budget holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from diffoundry.errors import StageError
from diffoundry.formats import quant_plan, recording, sensitivity
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext

if TYPE_CHECKING:
    from diffoundry.compression.sensitivity import Bench

MARGIN_DB = 0.5
"""How much better than the budget the plan is made on the tuning split: the check reads another."""

MIN_CALLS = 2
"""Calls that a measurement runs at least."""

BEFORE_CALLS = 2 + 2 * MIN_CALLS
"""Calls that count costs and rank layers (each layer computes twice)."""

FEW_MEASUREMENTS = 16
"""Measurements where layers are ranked: halving a row of 300 takes nine, the rest give some of them
back. More would be spent on a few layers' difference; the bound is kept with fewer calls each."""


@dataclass(frozen=True)
class ChoosePrecision:
    """Stage: torch_module, quant_plan, tuning recording -> quant_plan, sensitivity.

    drift_budget_db: SQNR of the component's output that must be left (the planner fills in what the
    profile's [limits.drift] or --drift-budget says; None: nothing is held). measure: "needed" looks
    at single layers only where the plan as it came breaks the budget, "always" in any case.
    cost: what integer kernels save, "multiply_adds" (the same on every host) or "seconds" (measured
    here). calls: of the tuning recording, spread evenly. max_float_share: of the cost.
    max_multiply_adds: of all that is measured. Where looking at each layer would take more, layers
    are ranked by their own outputs in one pass, and the ranking is halved; where one call takes
    much, fewer calls are run (Stable Diffusion's U-Net at 512 × 512: 5 calls a measurement and
    at most 17 measurements).
    """

    drift_budget_db: float | None = None
    measure: Literal["needed", "always"] = "needed"
    cost: Literal["multiply_adds", "seconds"] = "multiply_adds"
    calls: int = 8
    max_float_share: float = 0.5
    max_multiply_adds: float = 3e13

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy",
                                        "scikit-image")  # fmt: skip
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=1 << 30, weights=1.35, activations=4)

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
        from diffoundry.compression.sensitivity import Bench
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
            bench = Bench(module, contract, calls)
            table, plan = self._choose(bench, plan, context)
        sensitivity.save(context.work / "table", table)
        quant_plan.save(context.work / "plan", plan)
        return {"table": Produced(context.work / "table"), "plan": Produced(context.work / "plan")}

    def _choose(
        self, bench: Bench, plan: quant_plan.QuantPlan, context: StageContext
    ) -> tuple[sensitivity.Sensitivity, quant_plan.QuantPlan]:
        """Measure within the bounds. Raises StageError where the budget cannot be met."""
        from diffoundry.compression.budget import fit, fit_within
        from diffoundry.compression.sensitivity import measure_layers, rank_layers

        component, say = plan.component, context.say
        work = sum(bench.costs("multiply_adds").values())
        most_calls = self.max_multiply_adds / max(work, 1.0) - BEFORE_CALLS
        bench.keep_calls(max(MIN_CALLS, int(min(self.calls, most_calls / FEW_MEASUREMENTS))))
        whole = reached = bench.sqnr_db(plan)
        budget = None if self.drift_budget_db is None else self.drift_budget_db + MARGIN_DB
        broken = budget is not None and whole < budget
        say(f"{component}: {whole:.1f} dB on the tuning split")
        rows: tuple[sensitivity.Row, ...] = ()
        reverted: tuple[str, ...] = ()
        layers = sum(layer.integer_weight for layer in plan.layers)
        # One for each layer, and at most as many again while they go back to float.
        each = 2 * layers * len(bench.calls) < most_calls
        if broken or self.measure == "always":
            if each:
                rows = measure_layers(bench, plan, self.cost, context.journal, say)
            else:
                say(
                    f"{component}: {layers} layers × {len(bench.calls)} calls are too many: "
                    f"ranked by their own outputs, then {FEW_MEASUREMENTS} measurements at most"
                )
                rows = rank_layers(bench, plan, bench.costs(self.cost), MIN_CALLS)
        if broken and budget is not None:
            share, measure = self.max_float_share, bench.sqnr_db
            fitted = (
                fit(plan, rows, budget, share, measure, say)
                if each
                else fit_within(plan, rows, budget, share, measure, FEW_MEASUREMENTS, say)
            )
            plan, reached, reverted = fitted.plan, fitted.reached_db, fitted.reverted
        return (
            sensitivity.Sensitivity(
                component,
                rows,
                whole_db=round(whole, 3),
                reached_db=round(reached, 3),
                budget_db=self.drift_budget_db,
                reverted=reverted,
                method="alone" if each else "own_output",
                settings=dataclasses.asdict(self),
            ),
            plan,
        )
