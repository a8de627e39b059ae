"""Calls litert_torch: an exported program to a .tflite file in fp32, and its weights to fp16."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError
from diffoundry.exporters import tflite_fences
from diffoundry.formats import tflite
from diffoundry.memory import MappedFile
from diffoundry.types import Contract

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

STAGE = "tflite_from_exported_program"
_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"


def convert(
    program: ExportedProgram,
    contract: Contract,
    shapes: Sequence[Mapping[str, int]],
    file: Path,
    fenced: Collection[str] = (),
    mapped: Path | None = None,
) -> None:
    """Write `program` at `shapes` to `file`, a signature each. Raises StageError.

    `fenced`: layers that nothing is to be merged with (see `tflite_fences`). `mapped`: the file
    that the program's weights are mapped from, if any: each weight is let go once it is copied.
    """
    import torch

    module = _named_module(program, contract, fenced)
    try:
        with _quiet(), torch.no_grad():
            import litert_torch

            converter = litert_torch.Converter()
            for shape in shapes:
                name = tflite.signature_name(contract, shape)
                converter.add_signature(name, module, sample_kwargs=_examples(contract, shape))
            with _weights_let_go(mapped):
                converter.convert(strict_export=False).export(str(file))
    except Exception as error:  # whatever a converter raises, with where
        raise StageError(
            f"{STAGE}: {contract.component}",
            expected="a program that litert_torch can convert",
            found=_cause(error),
            remedy="leave this variant out, or report the operation to litert-torch",
        ) from error


@contextlib.contextmanager
def _weights_let_go(mapped: Path | None) -> Iterator[None]:
    """The converter copies each weight into its own program and clamps the original in place,
    which makes a second copy of every mapped page; neither is read again.

    Its `lightweight_conversion`, which copies nothing at first, holds more in the end: it folds
    all layers' transposed weights at once (860 M parameters, two shapes: 13.8 GB against 11.4).
    """
    from litert_torch.backend import lowerings
    from litert_torch.backend.inline_consts import tensor_lowering_placeholder

    own = lowerings.lookup(tensor_lowering_placeholder)
    if mapped is None or own is None:
        yield
        return
    pages = MappedFile(mapped)

    def lower_and_let_go(context: Any, weight: Any) -> Any:
        found = own(context, weight)
        pages.give_back(weight.data_ptr(), weight.numel() * weight.element_size())
        return found

    lowerings.lower(tensor_lowering_placeholder)(lower_and_let_go)
    try:
        yield
    finally:
        lowerings.lower(tensor_lowering_placeholder)(own)


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
            f"{STAGE}: {component}: weights in fp16",
            expected="a model that ai_edge_quantizer can rewrite",
            found=_cause(error),
            remedy="build it with precision = 'fp32'",
        ) from error


def _named_module(
    program: ExportedProgram, contract: Contract, fenced: Collection[str] = ()
) -> nn.Module:
    """The program as a module whose inputs and outputs have the contract's names.

    Its graph is interpreted node by node, so that each operation of the file keeps the name of
    the layer that it came from.
    """
    import torch

    inner = program.module(check_guards=False)  # its graph is a copy
    tflite_fences.build(inner, fenced)
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


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:600]


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
