"""Writes a quantization plan into an ONNX model: INT8 weights, and what quantizes activations.

An exporter, as what it writes is a file format's own: the plan says which layers become INT8, the
form how this format's readers want to see that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.onnx_integer import IntegerForm
from diffoundry.exporters.onnx_layers import Writer, find_layers
from diffoundry.exporters.onnx_qdq import QdqForm
from diffoundry.formats import onnx, quant_plan
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext

if TYPE_CHECKING:
    import onnx_ir as ir

# Larger weights lie beside the graph: whoever opens the model can map them, and what writes it
# never holds them in a message as well.
EXTERNAL_THRESHOLD_BYTES = 16_000_000

_FORMS: Mapping[str, type[IntegerForm | QdqForm]] = {"integer": IntegerForm, "qdq": QdqForm}


@dataclass(frozen=True)
class QuantizeOnnx:
    """Stage: onnx (fp32) and quant_plan -> onnx (int8).

    `form`: "integer" writes the operators that onnxruntime's CPU is fastest with, "qdq" pairs of
    QuantizeLinear and DequantizeLinear, which OpenVINO and TensorRT turn into their own kernels.
    `symmetric`: every activation's grid has its zero in the middle, made from the plan's ranges
    (TensorRT takes no other); False leaves that to the plan. `output_grids`: False ignores the
    ranges of outputs: exact outputs, but onnxruntime's fastest convolution needs them.
    `external_data_threshold_bytes`: weights above it go to model.onnx.data.
    """

    form: Literal["integer", "qdq"] = "integer"
    symmetric: bool = False
    output_grids: bool = True
    external_data_threshold_bytes: int = EXTERNAL_THRESHOLD_BYTES

    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir", "numpy")
    extra: ClassVar[str] = "build,onnx"
    memory: ClassVar[Memory] = Memory(libraries=700 << 20, weights=0.3, activations=0)

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ProfileError("quantize_onnx: form", expected=" or ".join(_FORMS),
                               found=str(self.form))  # fmt: skip

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {
            "model": (ArtifactType("onnx", "fp32"),),
            "plan": (ArtifactType("quant_plan"),),
        }

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("onnx", "int8")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Write the plan in, check that every planned layer is INT8 and no other.

        Raises ArtifactError that names planned layers which the model does not have.
        """
        import onnx_ir as ir

        plan = self._plan(quant_plan.load(inputs["plan"].path))
        wanted = {e.module: e.scheme for e in plan.layers if e.integer_weight}
        context.say(f"writing {len(wanted)} INT8 layers of {plan.component} as {self.form}")
        model = ir.load(onnx.model_file(inputs["model"].path))
        apply_plan(model, plan, self.form)
        target = context.work / "model"
        target.mkdir()
        onnx.save_ir(model, target, self.external_data_threshold_bytes)
        onnx.canonicalise(target)
        onnx.validate(target)
        found = onnx.integer_layers(target)
        if found != wanted:
            differ = sorted(
                f"{name}: {found.get(name, 'float')}, planned {wanted.get(name, 'float')}"
                for name in found.keys() | wanted.keys()
                if found.get(name) != wanted.get(name)
            )
            raise StageError(f"quantize_onnx: {plan.component}",
                             expected="every planned layer in INT8, and no other",
                             found="; ".join(differ))  # fmt: skip
        return {"model": Produced(target, inputs["model"].contract)}

    def _plan(self, plan: quant_plan.QuantPlan) -> quant_plan.QuantPlan:
        changes: dict[str, Any] = {"symmetric": True} if self.symmetric else {}
        changes |= {} if self.output_grids else {"output": None}
        layers = tuple(dataclasses.replace(entry, **changes) for entry in plan.layers)
        return dataclasses.replace(plan, layers=layers)


def apply_plan(model: ir.Model, plan: quant_plan.QuantPlan, form: str) -> None:
    """Rewrite `model` in place. Raises ArtifactError, StageError as `find_layers` does."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    writer = Writer(model)
    written = _FORMS[form](writer, plan)
    for layer in find_layers(model, plan):
        written.write(layer)
    if any(node.domain for node in model.graph):
        model.opset_imports.setdefault("com.microsoft", 1)
    RemoveUnusedNodesPass()(model)
