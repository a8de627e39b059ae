"""Writes an exported program as a Core ML program (.mlpackage), in fp16 or fp32."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters import (
    coreml_convert,
    coreml_describe,
    coreml_integer,
    coreml_programs,
    coreml_weights,
)
from diffoundry.formats import exported_program, mlpackage, quant_plan
from diffoundry.formats.edges import engine_contract, own_shapes
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Contract,
    Memory,
    Produced,
    ShapePolicy,
    StageContext,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

STAGE = "coreml_from_exported_program"
TARGETS = ("iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15")
NEWEST_TARGETS = ("iOS18", "macOS15")
"""Those that read several functions in one package."""
OLDEST_TARGETS = ("iOS16", "macOS13")
"""Those without `quantize` and `dequantize`."""
_USUAL = ShapePolicy("fixed")


@dataclass(frozen=True)
class CoremlFromExportedProgram:
    """Stage: exported_program (and quant_plan, where `precision` is "int8") -> mlpackage.

    `deployment_target`: the oldest system that must open it. `precision`: what it computes in;
    "int8" is fp16 with the layers of the plan in INT8 (iOS 17, macOS 14 or newer).
    `keep_fp32`: operations of an fp16 program that stay in fp32, with what only feeds them (the
    sinusoids of a timestep of 999 have no digits left in fp16). `weights`: "float" stores them in
    the precision; "int8" is linear, symmetric, per channel; "palette8", "palette6", "palette4"
    are lookup tables of 256, 64 and 16 values for each tensor. `palette_bits` (1, 2, 4, 6, 8)
    stores as tables, and nothing is rounded, what has so few values already (`palettize_weights`);
    `palette_group` as there. `image_output`: the one output is
    handed over as an RGB image (fixed shapes only). `author`, `license`, `version`: what Xcode
    shows. Shapes are enumerated (iOS 18 and macOS 15 where more than one input changes its size),
    fixed, or a range; inputs and outputs are float32, and int32 where int64 stood.
    """

    shape_policy: ShapePolicy = _USUAL
    deployment_target: Literal["iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15"] = "iOS17"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    keep_fp32: tuple[str, ...] = ("sin", "cos")
    weights: Literal["float", "int8", "palette8", "palette6", "palette4"] = "float"
    palette_bits: int = 0
    palette_group: int = 0
    image_output: bool = False
    author: str = ""
    license: str = ""
    version: str = ""

    tools: ClassVar[tuple[str, ...]] = ("torch", "coremltools", "numpy")
    extra: ClassVar[str] = "build,coreml"
    memory: ClassVar[Memory] = Memory(libraries=1200 << 20, weights=1.75, activations=1)

    def __post_init__(self) -> None:
        if isinstance(self.shape_policy, Mapping):  # options may come as plain data
            object.__setattr__(self, "shape_policy", ShapePolicy(**self.shape_policy))
        object.__setattr__(self, "keep_fp32", tuple(self.keep_fp32))
        for name, allowed in (
            ("deployment_target", TARGETS),
            ("precision", ("fp32", "fp16", "int8")),
            ("weights", coreml_weights.FORMS),
        ):
            if getattr(self, name) not in allowed:
                raise ProfileError(f"{STAGE}: {name}", expected=" or ".join(allowed),
                                   found=str(getattr(self, name)))  # fmt: skip
        self._check_compression()
        if self.image_output and self.shape_policy.kind != "fixed":
            raise ProfileError(
                f"{STAGE}: image_output",
                expected="shapes = 'fixed': a Core ML image has one size",
                found=f"{self.shape_policy.kind} shapes",
                remedy="fix the shapes of this variant, or leave image_output out",
            )

    def _check_compression(self) -> None:
        if self.precision == "int8" and self.deployment_target in OLDEST_TARGETS:
            raise ProfileError(
                f"{STAGE}: precision",
                expected="a deployment target that quantizes activations: "
                + " or ".join(one for one in TARGETS if one not in OLDEST_TARGETS),
                found=f"int8 on {self.deployment_target}",
            )
        if self.weights != "float" and (self.precision == "int8" or self.palette_bits):
            raise ProfileError(f"{STAGE}: weights",
                               expected="float, where a plan or palette_bits says how they are "
                               "stored", found=self.weights)  # fmt: skip
        if self.palette_bits not in (0, 1, 2, 4, 6, 8) or self.palette_group < 0:
            raise ProfileError(f"{STAGE}: palette_bits", expected="1, 2, 4, 6 or 8, or 0 for none",
                               found=f"{self.palette_bits}, groups of {self.palette_group}",
                               )  # fmt: skip
        if self.palette_group and self.deployment_target not in NEWEST_TARGETS:
            raise ProfileError(f"{STAGE}: palette_group", expected=" or ".join(NEWEST_TARGETS),
                               found=self.deployment_target)  # fmt: skip

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        plan = {"plan": (ArtifactType(quant_plan.KIND),)} if self.precision == "int8" else {}
        return {"program": (ArtifactType("exported_program"),), **plan}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("mlpackage", self.precision)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Convert and describe. Raises StageError with the converter's own words."""
        contract = context.contract
        if contract is None:
            raise StageError(STAGE, expected="a component's contract", found="none")
        engine = engine_contract(contract)
        shapes = own_shapes(contract, self.shape_policy)
        target, scratch = context.work / "model", context.work / "scratch"
        target.mkdir()
        scratch.mkdir()
        package = target / f"{contract.component}{mlpackage.SUFFIX}"
        program = exported_program.load(inputs["program"].path)
        if self.precision == "int8":
            program = coreml_integer.with_plan(program, quant_plan.load(inputs["plan"].path))
        self._write(program, engine, shapes, package, scratch, context)
        shutil.rmtree(scratch)
        mlpackage.canonicalise(target)
        weights = f"palette{self.palette_bits}" if self.palette_bits else self.weights
        notes = coreml_describe.Notes(
            self.precision, weights, self.author, self.license, self.version
        )
        coreml_describe.describe(package, engine, shapes, self.shape_policy.kind, notes)
        coreml_describe.check_edges(package, engine, shapes)
        return {"model": Produced(target, engine)}

    def _write(
        self,
        program: ExportedProgram,
        contract: Contract,
        shapes: tuple[dict[str, int], ...],
        package: Path,
        scratch: Path,
        context: StageContext,
    ) -> None:
        """Convert to `package`: one function whose shapes may change, or one for each shape."""
        settings = coreml_convert.Settings(
            self.deployment_target,
            "fp16" if self.precision == "int8" else self.precision,
            self.keep_fp32,
            self.weights,
            self.image_output,
            self.palette_bits,
            self.palette_group,
        )
        component = contract.component
        dynamic = self.shape_policy.kind == "dynamic" and bool(coreml_programs.moving(contract))
        if not dynamic and len(shapes) == 1:
            context.say(f"{component}: traced again at {_words(shapes[0])}, then Core ML")
            fixed = coreml_programs.at_shape(program, contract, shapes[0], self.image_output)
            coreml_convert.convert(fixed, contract, shapes, settings, package)
            return
        changing = [s for s in contract.inputs if len({s.shape(one) for one in shapes}) > 1]
        # Core ML's converter cannot leave the batch open: it builds group norm around it.
        batches = {shape.get("batch") for shape in shapes}
        if dynamic or (len(changing) == 1 and len(batches) == 1):
            context.say(f"{component}: to Core ML with {self.shape_policy.kind} shapes")
            flexible = coreml_programs.over_shapes(program)
            ranges = contract.axes if dynamic else ()
            coreml_convert.convert(flexible, contract, shapes, settings, package, ranges)
            return
        if self.deployment_target not in NEWEST_TARGETS:
            raise StageError(
                f"{STAGE}: {component}: enumerated shapes",
                expected="one input whose height or width changes, or a deployment target of "
                + " or ".join(NEWEST_TARGETS),
                found=f"{', '.join(s.name for s in changing)}; {self.deployment_target}",
                remedy="list shapes of one batch size, or raise deployment_target",
            )
        functions = {}
        for shape in shapes:
            context.say(f"{component}: traced again at {_words(shape)}, then Core ML")
            fixed = coreml_programs.at_shape(program, contract, shape)
            name = function_name(shape)
            functions[name] = scratch / f"{name}{mlpackage.SUFFIX}"
            coreml_convert.convert(fixed, contract, (shape,), settings, functions[name])
        coreml_convert.merge(functions, package, component)


def function_name(shape: Mapping[str, int]) -> str:
    """ "batch_1_height_64_width_96": what the app asks for in MLModelConfiguration."""
    return "_".join(f"{axis}_{value}" for axis, value in shape.items())


def _words(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in shape.items()) or "its only shape"
