"""Exported programs as Core ML's converter takes them: at one shape, or over sizes that move."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffoundry.errors import StageError
from diffoundry.exporters import coreml_integer
from diffoundry.formats.mlpackage import PIXEL_HALF
from diffoundry.types import Axis, Contract

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def moving(contract: Contract) -> tuple[Axis, ...]:
    """The axes with more than one value."""
    return tuple(axis for axis in contract.axes if axis.min != axis.max)


def at_shape(
    program: ExportedProgram, contract: Contract, shape: Mapping[str, int], pixels: bool = False
) -> ExportedProgram:
    """`program` traced again with every size a number, in Core ML's operators.

    `pixels`: its only output, RGB in -1..1 as [1, 3, height, width], becomes 0..255. Raises
    StageError where there is another output.
    """
    import torch

    examples = tuple(
        torch.zeros(spec.shape(shape), dtype=getattr(torch, spec.dtype)) for spec in contract.inputs
    )
    if pixels:
        _check_picture(contract, shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module: nn.Module = program.module(check_guards=False)
        if pixels:
            module = _pixels(module)
        # What the program was traced with is int64; zeros of int32 would be another type.
        inputs = tuple(
            value.to(node.meta["val"].dtype)
            for value, node in zip(examples, _placeholders(program), strict=True)
        )
        traced = torch.export.export(module, inputs, strict=False)
        return _lowered(traced)


def over_shapes(program: ExportedProgram) -> ExportedProgram:
    """`program` in Core ML's operators, its moving sizes as they are.

    torch.export writes a size that is a multiple as an expression (2*s), which Core ML's converter
    refuses for an input unless the expression itself has a range.
    """
    import torch
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        lowered = _lowered(program)
    ranges = dict(lowered.range_constraints)
    for node in _placeholders(lowered):
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                found = bound_sympy(size.node.expr, ranges)
                ranges[size.node.expr] = ValueRanges(int(found.lower), int(found.upper))
    lowered._range_constraints = ranges
    return lowered


def _lowered(program: ExportedProgram) -> ExportedProgram:
    """Core ATen operators, without the aliases that coremltools does not know."""
    import torch

    lowered = program.run_decompositions({})
    graph = lowered.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target == torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    coreml_integer.name_weights(graph)
    graph.lint()
    lowered.graph_module.recompile()
    return lowered


def _placeholders(program: ExportedProgram) -> list[Any]:
    """The graph's nodes of the user's inputs, in their order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in program.graph_signature.user_inputs]


def _check_picture(contract: Contract, shape: Mapping[str, int]) -> None:
    found = [spec.shape(shape) for spec in contract.outputs]
    if len(found) != 1 or len(found[0]) != 4 or found[0][:2] != (1, 3):
        raise StageError(
            f"coreml_from_exported_program: {contract.component}: image_output",
            expected="one output [1, 3, height, width]",
            found=", ".join(str(list(one)) for one in found),
            remedy="set image_output on the decoder alone, with batch 1",
        )


def _pixels(module: nn.Module) -> nn.Module:
    """The module with its picture in 0..255."""
    import torch

    class Pixels(torch.nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *feeds: torch.Tensor) -> torch.Tensor:
            found = self.inner(*feeds)
            picture = found[0] if isinstance(found, (tuple, list)) else found
            return torch.clamp(picture * PIXEL_HALF + PIXEL_HALF, 0.0, 2 * PIXEL_HALF)

    return Pixels(module)
