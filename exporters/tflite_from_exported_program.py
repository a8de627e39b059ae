"""Writes an exported program as TFLite: one file, one named signature for each shape."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffoundry.errors import ProfileError, StageError
from diffoundry.formats import exported_program, tflite
from diffoundry.formats.edges import engine_contract, own_shapes
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Contract,
    Produced,
    ShapePolicy,
    StageContext,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

_STAGE = "tflite_from_exported_program"
_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"
_USUAL = ShapePolicy("fixed")


@dataclass(frozen=True)
class TfliteFromExportedProgram:
    """Stage: exported_program -> tflite.

    `shape_policy`: "fixed" (the contract's opt shape where it names none) or "enumerated".
    `precision`: "fp32", or "fp16": the weights of convolutions and linear layers are stored in
    fp16 and computed with in fp32. `minimum_runtime`: the oldest LiteRT that must open the file
    ("" says nothing about it); a file past 2 GiB is refused where that is too old for one.
    """

    shape_policy: ShapePolicy = _USUAL
    precision: Literal["fp32", "fp16"] = "fp32"
    minimum_runtime: str = ""

    tools: ClassVar[tuple[str, ...]] = (
        "torch", "litert-torch", "litert-converter", "ai-edge-litert", "ai-edge-quantizer",
    )  # fmt: skip
    extra: ClassVar[str] = "build,tflite"
    retraces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.shape_policy, Mapping):  # options may come as plain data
            object.__setattr__(self, "shape_policy", ShapePolicy(**self.shape_policy))
        if self.shape_policy.kind == "dynamic":
            raise ProfileError(
                f"{_STAGE}: shapes",
                expected="'fixed', or a list of shapes",
                found="'dynamic': a TFLite file has no shapes that change between calls",
                remedy="list the shapes: shapes = [{ height = 64, width = 64 }, …]",
            )
        if self.precision not in ("fp32", "fp16"):
            raise ProfileError(f"{_STAGE}: precision", expected="fp32 or fp16",
                               found=str(self.precision))  # fmt: skip
        _version(self.minimum_runtime)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"program": (ArtifactType("exported_program"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("tflite", self.precision)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Convert and describe. Raises StageError with the converter's own words."""
        contract = context.contract
        if contract is None:
            raise StageError(_STAGE, expected="a component's contract", found="none")
        program = exported_program.load(inputs["program"].path)
        shapes = own_shapes(contract, self.shape_policy)
        # What the design counts: litert_torch takes modules, and traces one for each signature.
        context.say(f"{contract.component}: litert_torch traces {len(shapes)} time(s) again")
        target, scratch = context.work / "model", context.work / "scratch"
        target.mkdir()
        scratch.mkdir()
        file = tflite.model_file(target)
        fp32 = file if self.precision == "fp32" else scratch / tflite.MODEL_FILE
        convert(program, contract, shapes, fp32)
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
                f"{_STAGE}: {said}",
                expected=f"at most 2 GiB, or a runtime that reads more (LiteRT {needed})",
                found=f"the profile's minimum_runtime is {self.minimum_runtime}",
                remedy=remedy,
            )
        context.say(f"{said} needs LiteRT {needed} or newer on a 64-bit system; else {remedy}")


def convert(
    program: ExportedProgram,
    contract: Contract,
    shapes: Sequence[Mapping[str, int]],
    file: Path,
) -> None:
    """Write `program` at `shapes` to `file`, a signature each. Raises StageError."""
    import torch

    module = _named_module(program, contract)
    try:
        with _quiet(), torch.no_grad():
            import litert_torch

            converter = litert_torch.Converter()
            for shape in shapes:
                name = tflite.signature_name(contract, shape)
                converter.add_signature(name, module, sample_kwargs=_examples(contract, shape))
            converter.convert(strict_export=False).export(str(file))
    except Exception as error:  # whatever a converter raises, with where
        raise StageError(
            f"{_STAGE}: {contract.component}",
            expected="a program that litert_torch can convert",
            found=_cause(error),
            remedy="leave this variant out, or report the operation to litert-torch",
        ) from error


def store_weights_in_fp16(source: Path, target: Path, component: str) -> None:
    """Write `source` with the weights of its convolutions and linear layers in fp16.

    A DEQUANTIZE stands before each: kernels compute in fp32. Raises StageError.
    """
    try:
        with _quiet():
            from ai_edge_quantizer import qtyping, quantizer
            from ai_edge_quantizer.algorithm_manager import AlgorithmName

            lowering = quantizer.Quantizer(str(source))
            weights = qtyping.TensorQuantizationConfig(
                num_bits=16, dtype=qtyping.TensorDataType.FLOAT
            )
            for operation in ("CONV_2D", "FULLY_CONNECTED", "DEPTHWISE_CONV_2D",
                              "CONV_2D_TRANSPOSE", "EMBEDDING_LOOKUP"):  # fmt: skip
                lowering.update_quantization_recipe(
                    regex=".*",
                    operation_name=qtyping.TFLOperationName(operation),
                    algorithm_key=AlgorithmName.FLOAT_CASTING,
                    op_config=qtyping.OpQuantizationConfig(
                        weight_tensor_config=weights,
                        compute_precision=qtyping.ComputePrecision.FLOAT,
                        explicit_dequantize=True,
                    ),
                )
            lowering.quantize().export_model(str(target))
    except Exception as error:  # whatever the quantizer raises, with where
        raise StageError(
            f"{_STAGE}: {component}: weights in fp16",
            expected="a model that ai_edge_quantizer can rewrite",
            found=_cause(error),
            remedy="build it with precision = 'fp32'",
        ) from error


def _named_module(program: ExportedProgram, contract: Contract) -> nn.Module:
    """The program as a module whose inputs and outputs have the contract's names.

    Its graph is interpreted node by node, so that each operation of the file keeps the name of
    the layer that it came from.
    """
    import torch

    inner = program.module(check_guards=False)  # its graph is a copy
    for node in inner.graph.nodes:
        layers = list(node.meta.get("nn_module_stack", {}).values())
        if layers:
            # The last is the innermost; the converter writes the second entry as it is.
            node.meta["nn_module_stack"] = {"layer": ("", layers[-1][0] or "model")}
    names = [spec.name for spec in contract.inputs]
    outputs = [spec.name for spec in contract.outputs]

    class Named(torch.nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.fx.traceback.preserve_node_meta():
                found = torch.fx.Interpreter(self.inner).run(*[feeds[name] for name in names])
            values = found if isinstance(found, (tuple, list)) else (found,)
            return dict(zip(outputs, values, strict=True))

    named = Named(inner)
    named.training = False  # what eval() does; a program's module refuses to be asked
    return named


def _examples(contract: Contract, shape: Mapping[str, int]) -> dict[str, Any]:
    import torch

    return {
        spec.name: torch.zeros(spec.shape(shape), dtype=getattr(torch, spec.dtype))
        for spec in contract.inputs
    }


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
                f"{_STAGE}: {contract.component}: signature {name}",
                expected="; ".join(f"{n}: {d}{list(s)}" for n, d, s in sorted(expected)),
                found="; ".join(f"{n}: {d}{list(s)}" for n, d, s in sorted(found)) or "none",
                remedy="an input that the model does not use may not be in its contract",
            )


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:600]


def _version(text: str) -> tuple[int, ...]:
    """ "2.3.0" as numbers. Raises ProfileError."""
    try:
        return tuple(int(part) for part in text.split(".")) if text else ()
    except ValueError as error:
        raise ProfileError(
            f"{_STAGE}: minimum_runtime", expected="a version of LiteRT like 2.3.0", found=text
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back progress, logs and warnings of libraries; what goes wrong is raised."""
    disabled, shown = logging.root.manager.disable, os.environ.get(_PROGRESS)
    logging.disable(logging.WARNING)
    os.environ[_PROGRESS] = "n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        del os.environ[_PROGRESS]
        os.environ.update({} if shown is None else {_PROGRESS: shown})
