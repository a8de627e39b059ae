"""Rewrites an ONNX model into one that computes the same, faster on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.fusions import attention, fast_conv, gelu, group_norm
from diffoundry.exporters.fusions.editing import Graph
from diffoundry.exporters.fusions.sizes import sizes_of
from diffoundry.formats import onnx
from diffoundry.types import Artifact, ArtifactType, Memory, Produced, StageContext

RULES: Mapping[str, Callable[[Graph], int]] = {
    "attention": attention.apply,
    "gelu": gelu.apply,
    "group_norm": group_norm.apply,
    "fast_conv": fast_conv.apply,
}
"""Every rule, in the order in which they are applied."""
# Larger weights lie beside the graph: onnxruntime maps that file, and copies what is inside.
EXTERNAL_THRESHOLD_BYTES = 16_000_000


@dataclass(frozen=True)
class FuseOnnx:
    """Stage: onnx -> onnx of the same precision ("fp32", or "int8" in its integer form).

    `rules`: which ones, of RULES. `external_data_threshold_bytes`: weights above it go to
    model.onnx.data. What comes out runs in onnxruntime: some rules write its own operators.
    """

    precision: Literal["fp32", "int8"] = "fp32"
    rules: tuple[str, ...] = tuple(RULES)
    external_data_threshold_bytes: int = EXTERNAL_THRESHOLD_BYTES

    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir", "numpy")
    extra: ClassVar[str] = "build,onnx"
    memory: ClassVar[Memory] = Memory(libraries=500 << 20, weights=0.6, activations=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.precision not in ("fp32", "int8"):
            raise ProfileError("fuse_onnx: precision", expected="fp32 or int8",
                               found=str(self.precision))  # fmt: skip
        unknown = [rule for rule in self.rules if rule not in RULES]
        if unknown:
            raise ProfileError("fuse_onnx: rules", expected=", ".join(RULES),
                               found=", ".join(map(str, unknown)))  # fmt: skip

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"model": (ArtifactType("onnx", self.precision),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("onnx", self.precision)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Apply the rules, say how often each did. Raises StageError where INT8 layers are lost."""
        import onnx_ir as ir

        source = inputs["model"]
        model = ir.load(onnx.model_file(source.path))
        graph = Graph(model, sizes_of(source.path, context.contract))
        counts = {name: RULES[name](graph) for name in RULES if name in self.rules}
        done = ", ".join(f"{name} {count}×" for name, count in counts.items())
        context.say(f"rewrote {context.component or 'the model'}: {done or 'nothing'}")
        target = context.work / "model"
        target.mkdir()
        onnx.save_ir(model, target, self.external_data_threshold_bytes)
        onnx.canonicalise(target)
        if counts.get("fast_conv") or onnx.has_plain_layout(source.path):
            onnx.write_plain_layout(target)
        onnx.validate(target)
        before, after = onnx.integer_layers(source.path), onnx.integer_layers(target)
        if before != after:
            differ = sorted(name for name in before.keys() | after.keys()
                            if before.get(name) != after.get(name))  # fmt: skip
            raise StageError("fuse_onnx", expected="the INT8 layers of the model it was given",
                             found=f"another scheme for {', '.join(differ)}")  # fmt: skip
        return {"model": Produced(target, source.contract)}
