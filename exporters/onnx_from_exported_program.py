"""Writes an exported program as ONNX, in fp32 or fp16."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.onnx_crops import crop_convolutions
from diffoundry.formats import canonical, exported_program, onnx
from diffoundry.formats.onnx_canonical import name_nodes, read_sizes_from_first
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Contract,
    Memory,
    Produced,
    StageContext,
    TensorSpec,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class OnnxFromExportedProgram:
    """Stage: exported_program (and for fp16 a recording) -> onnx.

    `opset`: ONNX opset. `precision`: "fp32" or "fp16"; inputs and outputs are float32 in both.
    `external_data_threshold_bytes`: weights above it go to model.onnx.data.
    For fp16: nodes return to fp32, the loudest first, until every output's SQNR against fp32 on
    `calls` recorded calls reaches `target_sqnr_db`, but no more than `max_fp32_share` of the
    nodes; `max_trials` bounds the measurements. Of a large model they are fewer, on one smaller
    call (see `fp16_calls`).
    """

    opset: int = 18
    precision: Literal["fp32", "fp16"] = "fp32"
    external_data_threshold_bytes: int = onnx.EXTERNAL_THRESHOLD_BYTES
    target_sqnr_db: float = 50.0
    max_fp32_share: float = 0.25
    max_trials: int = 48
    calls: int = 2

    tools: ClassVar[tuple[str, ...]] = (
        "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy",
    )  # fmt: skip
    extra: ClassVar[str] = "build,onnx"
    memory: ClassVar[Memory] = Memory(libraries=800 << 20, weights=1.35, activations=2)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16"):
            raise ProfileError("onnx_from_exported_program: precision",
                               expected="fp32 or fp16", found=str(self.precision))  # fmt: skip
        if not 18 <= self.opset <= 23:
            raise ProfileError("onnx_from_exported_program: opset",
                               expected="18 to 23", found=str(self.opset))  # fmt: skip

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        program = {"program": (ArtifactType("exported_program"),)}
        if self.precision == "fp32":
            return program
        return {**program, "recording": (ArtifactType("recording"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("onnx", self.precision)}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Convert, check with onnx.checker, canonicalise. Raises StageError."""
        contract = context.contract
        if contract is None:
            raise StageError("onnx_from_exported_program", expected="a component's contract",
                             found="none")  # fmt: skip
        program = exported_program.load(inputs["program"].path)
        context.say(f"converting {contract.component} to ONNX opset {self.opset}")
        target, scratch = context.work / "model", context.work / "scratch"
        target.mkdir()
        scratch.mkdir()
        fp32 = target if self.precision == "fp32" else scratch
        write_fp32(program, contract, fp32, self.opset, self.external_data_threshold_bytes)
        del program
        if self.precision == "fp16":
            self._lower_precision(scratch, target, inputs["recording"].path, contract, context)
        shutil.rmtree(scratch)
        onnx.canonicalise(target)
        onnx.validate(target)
        return {"model": Produced(target)}

    def _lower_precision(
        self, fp32: Path, target: Path, recording: Path, contract: Contract, context: StageContext
    ) -> None:
        import onnx_ir as ir

        from diffoundry.exporters import fp16_choice, fp16_graph
        from diffoundry.exporters.fp16_calls import calls_to_measure

        # Each of these holds the weights once more: an earlier stage's program in this process, and
        # the converted model, whose nodes and values point at one another.
        exported_program.forget()
        gc.collect()
        model = ir.load(onnx.model_file(fp32))
        weights = [value.const_value for value in model.graph.initializers.values()]
        values = sum(int(tensor.size) for tensor in weights if tensor is not None)
        moves = any(not isinstance(d, int) for v in model.graph.inputs for d in v.shape or ())
        measured = calls_to_measure(
            recording, contract, self.calls, self.max_trials, values if moves else 0
        )
        choice = fp16_choice.choose(
            model,
            measured.calls,
            scratch=fp32,
            threads=context.threads,
            target_sqnr_db=self.target_sqnr_db,
            max_fp32_share=self.max_fp32_share,
            max_trials=measured.max_trials,
            say=context.say,
        )
        del model, weights
        document = {**choice.document(), "measured_at": list(measured.shapes)}
        model = ir.load(onnx.model_file(fp32))
        fp16_graph.to_fp16(model, set(choice.stays_fp32))
        onnx.save_ir(model, target, self.external_data_threshold_bytes)
        (target / onnx.PRECISION_FILE).write_text(canonical.pretty_json(document))


def write_fp32(
    program: ExportedProgram, contract: Contract, folder: Path, opset: int, threshold_bytes: int
) -> None:
    """Convert with torch.onnx, name inputs, outputs, axes and nodes. Raises StageError."""
    import torch

    try:
        with _quiet(), _without_quadratic_rules():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in contract.inputs],
                output_names=[spec.name for spec in contract.outputs],
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise StageError(
            f"onnx_from_exported_program: {contract.component}",
            expected=f"a program whose operators ONNX opset {opset} has",
            found=_cause(error),
            remedy="choose another opset, or report the operator",
        ) from error
    if converted is None:
        raise StageError("onnx_from_exported_program", expected="a model",
                         found="nothing from torch.onnx.export")  # fmt: skip
    model = converted.model
    _name_edges(model, contract)
    crop_convolutions(model)
    onnx.save_ir(model, folder, threshold_bytes)
    named = onnx.read_model(folder)
    read_sizes_from_first(named)
    name_nodes(named)
    onnx.write_model(named, folder)


@contextlib.contextmanager
def _without_quadratic_rules() -> Iterator[None]:
    """Leave out onnxscript's rules that look at the whole graph for every node of it.

    That is SlicesSplit, two outputs at once: 80 % of the optimiser's time for a U-Net of 1,800
    nodes, and growing with their square. It finds nothing in what torch.export writes: halves of
    a tensor (`chunk`) are a Split already.
    """
    from onnxscript import rewriter

    rules = rewriter._DEFAULT_REWRITE_RULES
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


def _cause(error: BaseException) -> str:
    """The innermost error: torch.onnx wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:600]


def _name_edges(model: Any, contract: Contract) -> None:
    """Give graph inputs and outputs the contract's dimensions ("height/8").

    Raises StageError where the converted graph lost an input or output, or has another.
    """
    graph = model.graph
    for what, values, specs in (
        ("inputs", graph.inputs, contract.inputs),
        ("outputs", graph.outputs, contract.outputs),
    ):
        found, expected = [v.name for v in values], [s.name for s in specs]
        if found != expected:
            raise StageError(
                f"{contract.component}: the converted graph's {what}",
                expected=", ".join(expected),
                found=", ".join(str(name) for name in found),
                remedy="an input that the model does not use may not be in its contract",
            )
        for value, spec in zip(values, specs, strict=True):
            value.shape = _edge_shape(value, spec)


def _edge_shape(value: Any, spec: TensorSpec) -> Any:
    """The traced shape, its moving sizes called what the contract calls them."""
    import onnx_ir as ir

    traced = value.shape.dims if value.shape is not None else spec.dims
    return ir.Shape(
        [size if isinstance(size, int) else str(dim)
         for size, dim in zip(traced, spec.dims, strict=True)]
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch.onnx says about packages that this model does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
