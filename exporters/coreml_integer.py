"""Puts a quantization plan into an exported program, in the operators that Core ML's converter
turns into INT8: `dequantize_per_channel` of a stored weight becomes a constexpr, and pairs of
`quantize_per_tensor` and `dequantize_per_tensor` stay as they are.

    weight_only   int8 weight -> dequantize -> [layer]
    static        x -> quantize -> dequantize -> [layer, int8 weight -> dequantize] -> y

Core ML compiles the second form into a product of integers where the device has one (W8A8).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from diffoundry.errors import StageError
from diffoundry.formats.mil_int8 import module_of, weight_name
from diffoundry.formats.quant_plan import (
    Grid,
    LayerPlan,
    QuantPlan,
    grid_of,
    integer_weight,
    refuse_missing,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_STAGE = "coreml_from_exported_program"


def with_plan(program: ExportedProgram, plan: QuantPlan) -> ExportedProgram:
    """A program that computes what `plan` says; `program` stays as it was.

    Raises StageError for schemes that Core ML does not have, ArtifactError that names all layers
    which are not there.
    """
    _check_schemes(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own pytree and quantization modules warn
        copy = program.run_decompositions({})
        editing = _Editing(copy)
        found = {one.module for one in plan.layers if not one.integer_weight}
        for node in list(copy.graph.nodes):
            layer = plan.by_module.get(_module_of(node))
            if layer is not None and layer.integer_weight and _is(node, layer):
                editing.quantize(node, layer, plan)
                found.add(layer.module)
        refuse_missing(plan, found, f"{_STAGE}: layers of the traced program")
        editing.finish()
    return copy


def name_weights(graph: Any) -> None:
    """Call each dequantized weight of a program's graph what `mil_int8` looks for.

    Tracing again loses names, but not those of the buffers.
    """
    for node in graph.nodes:
        if node.op == "call_function" and "dequantize_per_channel" in str(node.target):
            module = module_of(node.args[0].name)
            if module is not None:
                node._rename(weight_name(module))


def _check_schemes(plan: QuantPlan) -> None:
    dynamic = [one.module for one in plan.layers if one.scheme == "dynamic"]
    if dynamic:
        raise StageError(
            f"{_STAGE}: {plan.component}",
            expected="activations on fixed grids: Core ML has no dynamic ones",
            found=f"dynamic: {', '.join(dynamic)}",
            remedy="use the scheme 'static' or 'weight_only' for conv and linear",
        )


def _module_of(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _is(node: Any, layer: LayerPlan) -> bool:
    import torch

    aten = torch.ops.aten
    wanted: Mapping[str, Any] = {
        "conv": aten.conv2d.default,
        "linear": aten.linear.default,
        "embedding": aten.embedding.default,
    }
    return bool(node.target == wanted[layer.kind])


class _Editing:
    """Changes to the graph of a program that nobody else has."""

    def __init__(self, program: ExportedProgram) -> None:
        import torch
        from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

        self._operators = torch.ops.quantized_decomposed
        self._program, self._graph = program, program.graph
        self._parameters = program.graph_signature.inputs_to_parameters
        self._dequantized: dict[str, Any] = {}
        self._mode = next(
            value.fake_mode
            for value in (node.meta.get("val") for node in self._graph.nodes)
            if hasattr(value, "fake_mode")
        )

    def quantize(self, node: Any, layer: LayerPlan, plan: QuantPlan) -> None:
        place = 0 if layer.kind == "embedding" else 1
        node.update_arg(place, self._weight(node.args[place], layer, plan))
        bias = plan.bias(layer.module)
        if bias is not None:
            made = self._constant(f"{layer.module}.corrected_bias", bias)
            node.args = (*node.args[:2], made, *node.args[3:])
        if layer.activation is not None and layer.scheme == "static":
            grid = grid_of(layer.activation, layer.symmetric)
            node.update_arg(0, self._on_grid(node.args[0], grid, node))
        if layer.output is not None:
            users = list(node.users)
            made = self._on_grid(node, grid_of(layer.output, layer.symmetric), users[0])
            node.replace_all_uses_with(made, lambda user: user in users)

    def finish(self) -> None:
        self._graph.eliminate_dead_code()
        self._graph.lint()
        self._program.graph_module.recompile()

    def _weight(self, source: Any, layer: LayerPlan, plan: QuantPlan) -> Any:
        """The node of a layer's weight behind its grid."""
        import torch

        if layer.module not in self._dequantized:
            weight = self._program.state_dict[self._parameters[source.name]].detach().numpy()
            scale = plan.weight_scale(layer.module)
            stored = (
                self._constant(weight_name(layer.module), integer_weight(weight, scale)),
                self._constant(f"{layer.module}.scale", scale),
                self._constant(f"{layer.module}.zero", np.zeros(len(scale), np.int8)),
            )
            first = next(one for one in self._graph.nodes if one.op != "placeholder")
            with self._graph.inserting_before(first):
                made = self._graph.call_function(
                    self._operators.dequantize_per_channel.default,
                    (*stored, 0, -128, 127, torch.int8),
                )
            made.meta["val"] = source.meta["val"]
            self._dequantized[layer.module] = made
        return self._dequantized[layer.module]

    def _on_grid(self, source: Any, grid: Grid, before: Any) -> Any:
        """The value rounded to the grid."""
        import torch

        settings = (grid.scale, grid.signed_zero_point, -128, 127, torch.int8)
        pair = self._operators
        with self._graph.inserting_before(before):
            stored = self._graph.call_function(
                pair.quantize_per_tensor.default, (source, *settings)
            )
            made = self._graph.call_function(
                pair.dequantize_per_tensor.default, (stored, *settings)
            )
        value = source.meta["val"]
        stored.meta["val"], made.meta["val"] = value.to(torch.int8), value
        return made

    def _constant(self, target: str, value: Any) -> Any:
        """A buffer of the program, and the node that stands for it."""
        import torch
        from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

        signature = self._program.graph_signature
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        name = "b_" + target.replace(".", "_")
        users = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
        nodes = {node.name: node for node in self._graph.nodes if node.op == "placeholder"}
        with self._graph.inserting_before(nodes[users[0].arg.name]):
            made = self._graph.create_node("placeholder", name, name=name)
        made.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(made.name), target, persistent=True)
        signature.input_specs.insert(signature.input_specs.index(users[0]), spec)
        self._program.state_dict[target] = tensor
        return made
