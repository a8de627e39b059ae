"""What sizes a graph's values have at the shapes of its contract, from ONNX's shape inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffoundry.formats import onnx
from diffoundry.types import Contract

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

Dims = Mapping[str, tuple[int, ...]]
# Whether a size deep inside is even depends on the size outside modulo a power of two.
_MOST_SHAPES = 32
_SMALL_BYTES = 1024
# What makes a size of sizes.
_SCALARS = ("Squeeze", "Mul", "Add", "Div", "Sub")


class Sizes:
    """Sizes of values by name: at the usual shape, and whether they are multiples everywhere."""

    def __init__(self, usual: Dims, others: Sequence[Dims] = ()) -> None:
        self._usual, self._others = usual, others
        self._was: dict[str, str] = {}

    def same(self, name: str | None, known: str | None) -> None:
        """Say that a new value has the sizes of a known one."""
        self._was[name or ""] = self._known(known)

    def usual(self, name: str | None) -> tuple[int, ...] | None:
        """The dimensions at the contract's usual shape; None where they are not known."""
        return self._usual.get(self._known(name))

    def multiple_of(self, name: str | None, axis: int, step: int) -> bool:
        """Whether the size of an axis is a multiple of `step` at every shape that is allowed."""
        found = [dims.get(self._known(name)) for dims in (self._usual, *self._others)]
        return all(dims is not None and dims[axis] % step == 0 for dims in found)

    def smallest(self, name: str | None, axis: int) -> int:
        """The smallest size of an axis over the shapes that are allowed; 0 where not known."""
        found = [dims.get(self._known(name)) for dims in (self._usual, *self._others)]
        return min((dims[axis] if dims is not None else 0) for dims in found)

    def _known(self, name: str | None) -> str:
        return self._was.get(name or "", name or "")


def sizes_of(path: Path, contract: Contract | None) -> Sizes:
    """Sizes of an `onnx` artifact's values. Without a contract, or behind an operator that ONNX
    does not know, no size is known."""
    if contract is None:
        return Sizes({})
    model = _for_inference(onnx.read_model(path))
    steps = max((axis.max - axis.min) // axis.multiple_of for axis in contract.axes)
    shapes = [
        {a.name: min(a.min + step * a.multiple_of, a.max) for a in contract.axes}
        for step in range(min(steps + 1, _MOST_SHAPES))
    ]
    usual = _inferred(model, contract, contract.opt_shape())
    return Sizes(usual, [_inferred(model, contract, shape) for shape in shapes])


def _for_inference(model: ModelProto) -> ModelProto:
    """The same values in operators that inference knows, large weights without their bytes."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _SMALL_BYTES:
            tensor.ClearField("raw_data")
    made = onnx.helper.make_node
    axes = onnx.helper.make_tensor("/inference/axes", onnx.TensorProto.INT64, [1], [0])
    scalars = {out for node in model.graph.node if node.op_type in _SCALARS for out in node.output}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            product = f"{node.output[0]}.int32"
            nodes += [made("MatMulInteger", node.input[:2], [product]),
                      made("Cast", [product], node.output, to=onnx.TensorProto.FLOAT)]  # fmt: skip
        elif _makes_vector(node, scalars, constants):
            # Values of sizes are not followed through Reshape, but through this.
            nodes.append(made("Unsqueeze", [node.input[0], axes.name], node.output))
        else:
            nodes.append(node)
    model.graph.initializer.append(axes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _makes_vector(node: NodeProto, scalars: set[str], constants: Mapping[str, TensorProto]) -> bool:
    """Whether it reshapes one size to a list of one."""
    import onnx

    if node.op_type != "Reshape" or node.input[0] not in scalars or node.input[1] not in constants:
        return False
    return onnx.numpy_helper.to_array(constants[node.input[1]]).tolist() == [-1]


def _inferred(model: ModelProto, contract: Contract, shape: Mapping[str, int]) -> Dims:
    import onnx

    specs = {spec.name: spec for spec in (*contract.inputs, *contract.outputs)}
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, specs[value.name].shape(shape), strict=True):
            dim.dim_value = size
    found = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*found.graph.value_info, *model.graph.input, *model.graph.output)
        if all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim)
    }
