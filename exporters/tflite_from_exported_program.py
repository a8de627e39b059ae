"""Writes an exported program as TFLite: one file, one named signature for each shape."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.tflite_convert import STAGE, convert, store_weights_in_fp16
from diffoundry.exporters.tflite_integer import apply_plan, layers_to_fence
from diffoundry.formats import exported_program, quant_plan, tflite
from diffoundry.formats.edges import engine_contract, own_shapes
from diffoundry.types import (
    Array,
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

_PRECISIONS = ("fp32", "fp16", "int8")
_USUAL = ShapePolicy("fixed")


@dataclass(frozen=True)
class TfliteFromExportedProgram:
    """Stage: exported_program (and quant_plan, where `precision` is "int8") -> tflite.

    `shape_policy`: "fixed" (the contract's opt shape where it names none) or "enumerated".
    `precision`: "fp32"; "fp16": the weights of convolutions and linear layers are stored in fp16
    and computed with in fp32; "int8": the layers of the plan, between edges in float32.
    `minimum_runtime`: the oldest LiteRT that must open the file ("" says nothing about it); a file
    past 2 GiB is refused where that is too old for one.
    """

    shape_policy: ShapePolicy = _USUAL
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    minimum_runtime: str = ""

    tools: ClassVar[tuple[str, ...]] = (
        "torch", "litert-torch", "litert-converter", "ai-edge-litert", "ai-edge-quantizer",
    )  # fmt: skip
    extra: ClassVar[str] = "build,tflite"
    memory: ClassVar[Memory] = Memory(libraries=1200 << 20, weights=2.2, activations=1)
    retraces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.shape_policy, Mapping):  # options may come as plain data
            object.__setattr__(self, "shape_policy", ShapePolicy(**self.shape_policy))
        if self.shape_policy.kind == "dynamic":
            raise ProfileError(
                f"{STAGE}: shapes",
                expected="'fixed', or a list of shapes",
                found="'dynamic': a TFLite file has no shapes that change between calls",
                remedy="list the shapes: shapes = [{ height = 64, width = 64 }, …]",
            )
        if self.precision not in _PRECISIONS:
            raise ProfileError(f"{STAGE}: precision", expected=" or ".join(_PRECISIONS),
                               found=str(self.precision))  # fmt: skip
        _version(self.minimum_runtime)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        plan = {"plan": (ArtifactType(quant_plan.KIND),)} if self.precision == "int8" else {}
        return {"program": (ArtifactType("exported_program"),), **plan}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("tflite", self.precision)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Convert and describe. Raises StageError with the converter's own words."""
        contract = context.contract
        if contract is None:
            raise StageError(STAGE, expected="a component's contract", found="none")
        program = exported_program.load(inputs["program"].path)
        mapped = inputs["program"].path / exported_program.WEIGHTS_FILE
        shapes = own_shapes(contract, self.shape_policy)
        # What the design counts: litert_torch takes modules, and traces one for each signature.
        context.say(f"{contract.component}: litert_torch traces {len(shapes)} time(s) again")
        target, scratch = context.work / "model", context.work / "scratch"
        target.mkdir()
        scratch.mkdir()
        file = tflite.model_file(target)
        fp32 = file if self.precision == "fp32" else scratch / tflite.MODEL_FILE
        if self.precision == "int8":
            plan = quant_plan.load(inputs["plan"].path)
            convert(program, contract, shapes, fp32, layers_to_fence(plan), mapped)
            apply_plan(fp32, file, plan, _weights(program))
        else:
            convert(program, contract, shapes, fp32, mapped=mapped)
        if self.precision == "fp16":
            store_weights_in_fp16(fp32, file, contract.component)
        shutil.rmtree(scratch)
        engine = engine_contract(contract)
        _check_ends(target, engine, shapes)
        self._check_size(target, contract, context)
        tflite.write_facts(target, contract, self.precision)
        return {"model": Produced(target, engine)}

    def _check_size(self, folder: Path, contract: Contract, context: StageContext) -> None:
        size_bytes = tflite.model_file(folder).stat().st_size
        if size_bytes < tflite.LARGE_FILE_BYTES:
            return
        remedy = "; or ".join(tflite.LARGE_FILE_REMEDIES)
        said = f"{contract.component}: {size_bytes / 2**30:.1f} GiB in one file"
        needed = tflite.LARGE_FILE_RUNTIME
        if self.minimum_runtime and _version(self.minimum_runtime) < _version(needed):
            raise StageError(
                f"{STAGE}: {said}",
                expected=f"at most 2 GiB, or a runtime that reads more (LiteRT {needed})",
                found=f"the profile's minimum_runtime is {self.minimum_runtime}",
                remedy=remedy,
            )
        context.say(f"{said} needs LiteRT {needed} or newer on a 64-bit system; else {remedy}")


def _weights(program: ExportedProgram) -> dict[str, Array]:
    """The parameters by name, without copying them."""
    return {name: value.detach().numpy() for name, value in program.state_dict.items()}


def _check_ends(folder: Path, contract: Contract, shapes: Sequence[Mapping[str, int]]) -> None:
    """Raise StageError where the file lost an input or output, or has it otherwise."""
    signatures = {one.name: one for one in tflite.read_signatures(folder)}
    for shape in shapes:
        name = tflite.signature_name(contract, shape)
        expected = [(s.name, s.dtype, s.shape(shape)) for s in contract.inputs + contract.outputs]
        found = []
        if name in signatures:
            tensors = {**signatures[name].inputs, **signatures[name].outputs}
            found = [(key, one.dtype, one.shape) for key, one in tensors.items()]
        if sorted(expected) != sorted(found):
            raise StageError(
                f"{STAGE}: {contract.component}: signature {name}",
                expected="; ".join(f"{n}: {d}{list(s)}" for n, d, s in sorted(expected)),
                found="; ".join(f"{n}: {d}{list(s)}" for n, d, s in sorted(found)) or "none",
                remedy="an input that the model does not use may not be in its contract",
            )


def _version(text: str) -> tuple[int, ...]:
    """ "2.3.0" as numbers. Raises ProfileError."""
    try:
        return tuple(int(part) for part in text.split(".")) if text else ()
    except ValueError as error:
        raise ProfileError(
            f"{STAGE}: minimum_runtime", expected="a version of LiteRT like 2.3.0", found=text
        ) from error
