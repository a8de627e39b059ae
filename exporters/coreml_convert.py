"""Calls coremltools: an exported program to an .mlpackage, several of them to one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError
from diffoundry.exporters import coreml_weights
from diffoundry.types import Axis, Contract, TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

STAGE = "coreml_from_exported_program"
_PRODUCTS = ("conv", "conv_transpose", "linear", "matmul", "einsum")


@dataclass(frozen=True)
class Settings:
    """What a conversion does besides translating; see CoremlFromExportedProgram."""

    deployment_target: str
    precision: str
    keep_fp32: tuple[str, ...]
    weights: str
    image_output: bool
    palette_bits: int = 0
    palette_group: int = 0


def convert(
    program: ExportedProgram,
    contract: Contract,
    shapes: Sequence[Mapping[str, int]],
    settings: Settings,
    package: Path,
    ranges: tuple[Axis, ...] = (),
) -> None:
    """Write `program` to `package`, for `shapes` (the first is the usual) or over `ranges`.

    Raises StageError with the converter's own words.
    """
    with _explained(contract.component, "a program that coremltools can convert"), _quiet():
        import coremltools as ct

        _count_from_zero()
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, settings.deployment_target),
            compute_precision=_precision(settings),
            pass_pipeline=_pipeline(settings),
            inputs=[_input(spec, shapes, ranges) for spec in contract.inputs],
            outputs=[_output(spec, settings) for spec in contract.outputs],
            skip_model_load=True,
        )
        # In fp32 the same options serve the baseline, whose weights nobody has palettized.
        if settings.palette_bits and settings.precision == "fp16":
            coreml_weights.check_tables(model, settings.palette_bits)
        model.save(str(package))


def _pipeline(settings: Settings) -> Any:
    """coremltools' passes without the one that makes a batch norm of a group norm's scale.

    Its epsilon of 1e-5 scales everything by 0.999995: alone it makes the error of a fp32 U-Net
    sixteen times as large.
    """
    import coremltools as ct

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    coreml_weights.add_passes(
        pipeline, settings.weights, settings.palette_bits, settings.palette_group
    )
    return pipeline


def merge(functions: Mapping[str, Path], package: Path, component: str) -> None:
    """Write one package with a function for each of `functions`, the first the default one.

    Equal weights are stored once. Raises StageError.
    """
    with _explained(component, "packages that coremltools can merge"), _quiet():
        from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

        _count_from_zero()
        descriptor = MultiFunctionDescriptor()
        for name, source in functions.items():
            descriptor.add_function(str(source), "main", name)
        descriptor.default_function_name = next(iter(functions))
        save_multifunction(descriptor, str(package))


def _count_from_zero() -> None:
    """Let coremltools number the values of a program from zero.

    It does so only after a conversion that succeeds: one that failed would change the names, and
    so the bytes, of the next one in its process.
    """
    from coremltools.converters.mil import Builder

    Builder.name_count.clear()


def _input(spec: TensorSpec, shapes: Sequence[Mapping[str, int]], ranges: tuple[Axis, ...]) -> Any:
    import coremltools as ct
    import numpy as np

    own = list(dict.fromkeys(spec.shape(shape) for shape in shapes))
    if ranges:
        shape: Any = [_range(dim, spec, ranges) for dim in spec.dims]
    elif len(own) > 1:
        shape = ct.EnumeratedShapes(own, default=own[0])
    else:
        shape = own[0]
    return ct.TensorType(name=spec.name, shape=shape, dtype=np.dtype(spec.dtype).type)


def _range(dim: Any, spec: TensorSpec, ranges: tuple[Axis, ...]) -> Any:
    """A number, or the range of sizes that the axis' values have in this tensor."""
    import coremltools as ct

    if isinstance(dim, int):
        return dim
    axis = next(axis for axis in ranges if axis.name == dim.axis)
    low, usual, high = (dim.size({axis.name: v}) for v in (axis.min, axis.opt, axis.max))
    return low if low == high else ct.RangeDim(low, high, usual)


def _output(spec: TensorSpec, settings: Settings) -> Any:
    import coremltools as ct
    import numpy as np

    if settings.image_output:
        return ct.ImageType(name=spec.name, color_layout=ct.colorlayout.RGB)
    return ct.TensorType(name=spec.name, dtype=np.dtype(spec.dtype).type)


def _precision(settings: Settings) -> Any:
    import coremltools as ct

    if settings.precision == "fp32":
        return ct.precision.FLOAT32
    stays = _stays_fp32(settings.keep_fp32)
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: not stays(op))


def _stays_fp32(kinds: tuple[str, ...]) -> Callable[[Any], bool]:
    """Whether an operation is of these kinds, or all that becomes of it goes into such ones.

    What feeds them is followed up to the first product of matrices.
    """
    known: dict[str, bool] = {}

    def stays(op: Any) -> bool:
        if op.name not in known:
            known[op.name] = False  # ends a loop, which a graph does not have
            readers = [reader for output in op.outputs for reader in output.child_ops]
            known[op.name] = op.op_type in kinds or (
                op.op_type not in _PRODUCTS and bool(readers) and all(map(stays, readers))
            )
        return known[op.name]

    return stays


@contextlib.contextmanager
def _explained(component: str, expected: str) -> Iterator[None]:
    """Whatever the converter raises, as a StageError that keeps its words."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise StageError(
            f"{STAGE}: {component}",
            expected=expected,
            found=f"{type(cause).__name__}: {cause}".strip()[:600],
            remedy="leave this variant out, fix the axis that the converter cannot move, or "
            "report the operation to coremltools",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back progress, logs and warnings of coremltools; what goes wrong is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
