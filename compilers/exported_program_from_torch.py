"""Traces a PyTorch component with torch.export, its axes named after the contract's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffoundry.errors import ContractError, StageError
from diffoundry.formats import exported_program
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    Memory,
    Produced,
    StageContext,
    TensorSpec,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class ExportedProgramFromTorch:
    """Stage: torch_module -> exported_program.

    `shapes`: "dynamic" keeps every axis whose minimum and maximum differ, and so does
    "enumerated"; "fixed" traces the contract's opt shape only. The example inputs are made from
    the contract: tracing reads shapes, not values.
    """

    shapes: Literal["dynamic", "enumerated", "fixed"] = "dynamic"

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers")
    extra: ClassVar[str] = "build"
    memory: ClassVar[Memory] = Memory(libraries=850 << 20, weights=1.05, activations=1)

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"module": (ArtifactType("torch_module"),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"program": ArtifactType("exported_program", "fp32")}

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Trace and save. Raises StageError where torch.export refuses the module."""
        from diffoundry.models.components import load_component

        contract = context.contract
        if contract is None:
            raise StageError("exported_program_from_torch", expected="a component's contract",
                             found="none")  # fmt: skip
        module = load_component(inputs["module"].path, contract.component)
        context.say(f"tracing {contract.component}")
        program = trace(module, contract, dynamic=self.shapes != "fixed")
        exported_program.save(program, context.work)
        return {"program": Produced(context.work)}


def trace(module: nn.Module, contract: Contract, dynamic: bool = True) -> ExportedProgram:
    """torch.export of `module` over the contract's axes. Raises StageError, ContractError."""
    import torch

    axes = _moving_axes(contract) if dynamic else ()
    shape = example_shape(contract, axes)
    examples = tuple(_example(spec, shape) for spec in contract.inputs)
    dims = {axis.name: _dim(axis) for axis in axes}
    dynamic_shapes = tuple(_dynamic_dims(spec, contract, dims) for spec in contract.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # What a model warns about while it is traced says nothing about the result.
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, examples, dynamic_shapes=dynamic_shapes, strict=False
            )
    except (
        torch._dynamo.exc.UserError,
        torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
        torch.fx.experimental.symbolic_shapes.ConstraintViolationError,
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
    ) as error:
        raise StageError(
            f"exported_program_from_torch: {contract.component}",
            expected=f"a module that can be traced over {', '.join(dims) or 'a fixed shape'}",
            found=str(error).strip()[:600],
            remedy="narrow the axis in the profile, or use shapes = 'fixed'",
        ) from error
    return program


def _moving_axes(contract: Contract) -> tuple[Axis, ...]:
    return tuple(axis for axis in contract.axes if axis.min != axis.max)


def example_shape(contract: Contract, moving: tuple[Axis, ...]) -> dict[str, int]:
    """Axis values to trace at: never one step where more are allowed, and no two sizes alike.

    torch.export turns a size of one, and sizes that happen to be equal, into constants.
    """
    shape = contract.opt_shape()
    taken: set[int] = set()
    for axis in moving:
        steps = range(axis.min // axis.multiple_of, axis.max // axis.multiple_of + 1)
        free = [step for step in steps if step > 1 and step not in taken] or [steps[-1]]
        # The nearest to the usual size that is free.
        wanted = axis.opt // axis.multiple_of
        step = min(free, key=lambda step: (abs(step - wanted), step))
        taken.add(step)
        shape[axis.name] = step * axis.multiple_of
    return shape


def _dim(axis: Axis) -> Any:
    from torch.export import Dim

    low, high = axis.min // axis.multiple_of, axis.max // axis.multiple_of
    return Dim(axis.name, min=low, max=high)


def _dynamic_dims(spec: TensorSpec, contract: Contract, dims: Mapping[str, Any]) -> dict[int, Any]:
    """Position -> k × Dim, where one step of the axis is k in this tensor."""
    found = {}
    for position, dim in enumerate(spec.dims):
        if isinstance(dim, AxisRef) and dim.axis in dims:
            step = contract.axis(dim.axis).multiple_of * dim.factor
            if step % dim.divisor:
                raise ContractError(
                    f"{contract.component}: {spec.name} dimension {position}",
                    expected=f"an axis whose steps are a multiple of {dim.divisor}",
                    found=f"{dim.axis} in steps of {contract.axis(dim.axis).multiple_of}",
                    remedy="make the axis a multiple of the divisor, or fix it (min = max)",
                )
            factor = step // dim.divisor
            found[position] = dims[dim.axis] if factor == 1 else factor * dims[dim.axis]
    return found


def _example(spec: TensorSpec, shape: Mapping[str, int]) -> Any:
    import torch

    size, dtype = spec.shape(shape), getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, generator=generator, dtype=dtype)
    return torch.zeros(size, dtype=dtype)
