"""Estimates a quantization plan with NNCF's post-training quantization of the exported graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffoundry.compression.estimating import (
    PlanSettings,
    check_calls,
    check_settings,
    complete,
    draft,
    refuse_sick,
)
from diffoundry.errors import StageError
from diffoundry.formats import quant_plan, recording
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan
from diffoundry.formats.recording import Call
from diffoundry.types import Artifact, ArtifactType, Contract, Produced, StageContext


@dataclass(frozen=True)
class QuantizeNncf(PlanSettings):
    """Stage: torch_module, recording -> quant_plan.

    NNCF takes a graph of fixed shapes only (a size that moves is an edge that it cannot watch), so
    the module is traced here, at the commonest shape of the calls; calls of that shape are looked
    at.

    Options as in `QuantizeFx`, with these differences. own_ranges: NNCF's way (means of the calls'
    extremes) instead of `ranges`, of which NNCF knows minmax and percentile (per call, then the
    mean). bias_correction: NNCF's fast one, which counts in what the quantized inputs lose.
    symmetric: NNCF's preset "performance", else "mixed". transformer: tell NNCF that it is one.
    calls: at most so many, NNCF's subset size. A layer whose input NNCF leaves alone keeps INT8
    weights only. SmoothQuant is `smooth_linear`'s; quantize_outputs is not NNCF's to say.
    """

    own_ranges: bool = True
    transformer: bool = True
    calls: int = 300

    tools: ClassVar[tuple[str, ...]] = ("torch", "nncf", "torchao", "diffusers", "transformers",
                                        "numpy")  # fmt: skip
    extra: ClassVar[str] = "build,quantize"

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "module": (ArtifactType("torch_module"),),
            "calibration": (ArtifactType("recording"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"plan": ArtifactType(quant_plan.KIND)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Let NNCF look, and plan. Raises StageError for a calibration set that will not do,
        values that are not finite, or options that NNCF does not have."""
        from diffoundry.compilers.exported_program_from_torch import trace
        from diffoundry.compression.nncf_observing import extremes
        from diffoundry.models.components import load_component
        from diffoundry.models.determinism import deterministic

        component, contract = context.component, context.contract
        if component is None or contract is None:
            raise StageError("quantize_nncf", expected="a component", found="none")
        where = f"quantize_nncf: {component}"
        check_settings(self, where)
        self._check(where)
        calls = recording.load_component(inputs["calibration"].path).calls
        check_calls(calls, where)
        module = load_component(inputs["module"].path, component)
        layers = draft(module, self)
        static = [layer.module for layer in layers if layer.scheme == "static"]
        shape, calls = alike(calls)
        check_calls(calls, where)
        fixed = at_shape(contract, shape)
        context.say(f"{component}: NNCF looks at {len(static)} layers on {len(calls)} calls")
        with deterministic(context.threads):
            taken = extremes(module, contract, recording.spread(calls, self.calls), static)
            refuse_sick(component, "quantize_nncf", taken)
            program = trace(module, fixed, dynamic=False)
            plan = self._plan(module, program, contract, calls, layers, static)
        folder = context.work / "plan"
        quant_plan.save(folder, plan)
        return {"plan": Produced(folder)}

    def _check(self, where: str) -> None:
        problems = []
        if self.ranges == "mse" and not self.own_ranges:
            problems.append("ranges = 'mse'")
        if self.quantize_outputs or self.outputs_of:
            problems.append("quantize_outputs")
        if self.calls < 1:
            problems.append(f"calls = {self.calls}")
        if problems:
            raise StageError(where, expected="options that NNCF has", found="; ".join(problems),
                             remedy="use quantize_fx for these")  # fmt: skip

    def _plan(
        self,
        module: Any,
        program: Any,
        contract: Contract,
        calls: Sequence[Call],
        layers: tuple[LayerPlan, ...],
        static: list[str],
    ) -> QuantPlan:
        from diffoundry.compression.nncf_observing import NncfOptions, ask_nncf

        found = ask_nncf(
            program,
            contract,
            calls,
            static,
            NncfOptions(
                calls=self.calls,
                transformer=self.transformer,
                symmetric=self.symmetric,
                range_method="own" if self.own_ranges else self.ranges,
                percentile=self.percentile,
                bias_correction=self.bias_correction,
            ),
        )
        made, tensors = [], {}
        for layer in layers:
            chosen = found.get(layer.module)
            if chosen is not None and chosen.activation is None:
                layer = dataclasses.replace(
                    layer, scheme="weight_only", why=f"{layer.why}; NNCF left its input alone"
                )
            elif chosen is not None:
                layer = dataclasses.replace(layer, activation=chosen.activation)
            made.append(layer)
            if chosen is not None and chosen.bias is not None:
                tensors[f"{layer.module}.bias"] = chosen.bias
        plain = dataclasses.replace(self, bias_correction=False)
        waiting = [dataclasses.replace(one, scheme="weight_only") for one in made
                   if one.integer_weight]  # fmt: skip
        plan = complete(module.state_dict(), contract.component, "quantize_nncf", plain, waiting,
                        {}, {})  # fmt: skip
        return dataclasses.replace(
            plan,
            settings=dataclasses.asdict(self),
            layers=tuple(made),
            tensors={**plan.tensors, **tensors},
        )


def alike(calls: Sequence[Call]) -> tuple[Mapping[str, int], tuple[Call, ...]]:
    """The commonest shape among the calls (the first of equals), and the calls that have it."""
    shapes = [tuple(sorted(call.shape.items())) for call in calls]
    chosen = max(shapes, key=shapes.count)
    return dict(chosen), tuple(c for c, one in zip(calls, shapes, strict=True) if one == chosen)


def at_shape(contract: Contract, shape: Mapping[str, int]) -> Contract:
    """The contract with every axis at `shape`."""
    axes = tuple(dataclasses.replace(one, opt=shape[one.name]) for one in contract.axes)
    return dataclasses.replace(contract, axes=axes)
