"""Rewrites a TFLite file: integer tensors, and QUANTIZE and DEQUANTIZE operations around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffoundry.errors import ArtifactError
from diffoundry.formats.quant_plan import Grid
from diffoundry.types import Array

_ALIGNMENT = 16
"""Bytes that the schema aligns the data of a buffer to."""
_LARGEST_BYTES = 2**31 - 2**26
"""Of all constants: the graph itself needs the rest of 2 GiB."""


class Model:
    """A file as objects. Constants are views of it until they are replaced."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._buffers: dict[bytes, int] = {}

    @staticmethod
    def read(path: Path) -> Model:
        """The file is mapped, not read."""
        from ai_edge_litert.tools import flatbuffer_utils

        return Model(flatbuffer_utils.read_model(str(path)))

    def graphs(self) -> Iterator[Graph]:
        for graph in self._model.subgraphs:
            yield Graph(self._model, graph, self._buffers)

    def write(self, path: Path) -> None:
        """Without the constants that nothing reads any more; equal models give equal bytes.

        Raises ArtifactError for more than a flatbuffer holds (2 GiB).
        """
        import flatbuffers

        self._drop_unread()
        shared = self._model.buffers
        total = sum(len(one.data) for one in shared if one.data is not None)
        if total >= _LARGEST_BYTES:
            raise ArtifactError(
                str(path),
                expected=f"weights of less than {_LARGEST_BYTES} bytes",
                found=f"{total} bytes",
                remedy="let the plan make more layers INT8",
            )
        try:
            self._model.buffers = [_aligned(one) for one in shared]
            # As large as it will be: growing would copy it.
            builder = flatbuffers.Builder(total + (1 << 20))
            builder.Finish(self._model.Pack(builder), file_identifier=b"TFL3")
        finally:
            self._model.buffers = shared
        with path.open("wb") as file:
            file.write(memoryview(builder.Bytes)[builder.Head() :])

    def _drop_unread(self) -> None:
        read = {tensor.buffer for g in self._model.subgraphs for tensor in g.tensors}
        read |= {one.buffer for one in self._model.metadata or ()}
        for number, buffer in enumerate(self._model.buffers):
            if number not in read:
                buffer.data = None


class Graph:
    """One subgraph. Tensors are named by their index."""

    def __init__(self, model: Any, graph: Any, buffers: dict[bytes, int]) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema, self._model, self._graph = schema, model, graph
        self._buffers = buffers
        self._names = {
            number: name
            for name, number in vars(schema.BuiltinOperator).items()
            if isinstance(number, int)
        }
        self._quantized: dict[tuple[int, Grid], int] = {}

    def operators(self) -> list[Any]:
        """In the order in which they run."""
        return list(self._graph.operators)

    def kind(self, operator: Any) -> str:
        """ "CONV_2D"."""
        code = self._model.operatorCodes[operator.opcodeIndex]
        return self._names[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def constants(self) -> list[tuple[int, Array]]:
        """Index and value of every float32 constant."""
        found = []
        for index, tensor in enumerate(self._graph.tensors):
            data = self._model.buffers[tensor.buffer].data
            if tensor.type == self._schema.TensorType.FLOAT32 and data is not None:
                value = np.asarray(data).view(np.uint8).reshape(-1).view(np.float32)
                found.append((index, value.reshape(self._shape(tensor))))
        return found

    def rank(self, index: int) -> int:
        return len(self._shape(self._graph.tensors[index]))

    def remove(self, kind: str, constant: float) -> int:
        """Take out every operator of a kind that has this scalar as its second input; how many."""
        going = [
            one
            for one in self._graph.operators
            if self.kind(one) == kind and self._scalar(int(one.inputs[1])) == constant
        ]
        ends = {int(one) for one in self._graph.outputs}
        for operator in going:
            source, made = int(operator.inputs[0]), int(operator.outputs[0])
            self._graph.operators = [one for one in self._graph.operators if one is not operator]
            for other in self._graph.operators:
                self.replace_input(other, made, source)
                if made in ends:  # an output keeps its tensor
                    self.replace_input(other, source, made)
                    other.outputs = [made if one == source else int(one) for one in other.outputs]
        return len(going)

    def _scalar(self, index: int) -> float | None:
        tensor = self._graph.tensors[index]
        data = self._model.buffers[tensor.buffer].data
        if tensor.type != self._schema.TensorType.FLOAT32 or data is None or len(data) != 4:
            return None
        return float(np.asarray(data).view(np.uint8).reshape(-1).view(np.float32)[0])

    def reading(self, index: int) -> list[Any]:
        """The operators that have the tensor among their inputs."""
        return [one for one in self._graph.operators if index in list(one.inputs)]

    def make_integer(self, index: int, values: Array, scale: Array, axis: int, name: str) -> None:
        """The constant becomes `values` (int8), on symmetric grids of scale [channels]."""
        tensor = self._graph.tensors[index]
        tensor.name = name.encode()
        tensor.type = self._schema.TensorType.INT8
        tensor.buffer = self._buffer(values)
        tensor.quantization = self._grids(scale, np.zeros(len(scale), np.int64), axis)

    def dequantized_constant(self, index: int) -> int:
        """A float tensor with the value of an integer constant."""
        source = self._graph.tensors[index]
        made = self._tensor(source, "dequantized", self._schema.TensorType.FLOAT32)
        self._insert(0, "DEQUANTIZE", index, made)
        return made

    def replace_input(self, operator: Any, old: int, new: int) -> None:
        operator.inputs = [new if one == old else int(one) for one in operator.inputs]

    def quantize_inputs_asymmetrically(self, operator: Any) -> None:
        """What the kernels of XNNPACK do anyway, and LiteRT's own when told to."""
        operator.builtinOptions.asymmetricQuantizeInputs = True

    def quantize_input(self, operator: Any, grid: Grid) -> None:
        """Put a QUANTIZE before the first input, one for all that read it on this grid."""
        source = int(operator.inputs[0])
        made = self._quantized.get((source, grid))
        if made is None:
            made = self._tensor(self._graph.tensors[source], "int8", self._schema.TensorType.INT8)
            self._graph.tensors[made].quantization = self._on_grid(grid)
            self._insert(self._after(source), "QUANTIZE", source, made)
            self._quantized[source, grid] = made
        operator.inputs = [made, *(int(one) for one in operator.inputs[1:])]

    def dequantize_output(self, operator: Any, grid: Grid) -> None:
        """The operator writes integers, and a DEQUANTIZE after it the tensor that it wrote."""
        (wanted,) = (int(one) for one in operator.outputs)
        made = self._tensor(self._graph.tensors[wanted], "int8", self._schema.TensorType.INT8)
        self._graph.tensors[made].quantization = self._on_grid(grid)
        operator.outputs = [made]
        self._insert(self._position(operator) + 1, "DEQUANTIZE", made, wanted)

    def add_to_bias(self, operator: Any, added: Array) -> None:
        """Add float32 [out] to the bias of a float layer, which gets one where it has none."""
        own = self._bias(operator)
        value = added if own is None else own + added
        self._set_bias(operator, value.astype(np.float32), self._schema.TensorType.FLOAT32, None)

    def make_bias_integer(self, operator: Any, scale: Array) -> None:
        """The bias as int32 on the grids of the products, float32 [out]."""
        own = self._bias(operator)
        if own is None:
            return
        limit = np.iinfo(np.int32)
        steps = np.clip(np.rint(own.astype(np.float64) / scale), limit.min, limit.max)
        grids = self._grids(scale, np.zeros(len(scale), np.int64), 0)
        self._set_bias(operator, steps.astype(np.int32), self._schema.TensorType.INT32, grids)

    def _bias(self, operator: Any) -> Array | None:
        if len(operator.inputs) < 3 or operator.inputs[2] < 0:
            return None
        data = self._model.buffers[self._graph.tensors[operator.inputs[2]].buffer].data
        return np.asarray(data).view(np.uint8).reshape(-1).view(np.float32)

    def _set_bias(self, operator: Any, value: Array, kind: int, grids: Any) -> None:
        weight = self._graph.tensors[operator.inputs[1]]
        made = self._tensor(weight, "bias", kind)
        tensor = self._graph.tensors[made]
        tensor.shape, tensor.shapeSignature = [len(value)], None
        tensor.buffer, tensor.quantization = self._buffer(value), grids
        operator.inputs = [int(operator.inputs[0]), int(operator.inputs[1]), made]

    def _after(self, index: int) -> int:
        """The place behind the operator that writes a tensor."""
        for place, operator in enumerate(self._graph.operators):
            if index in list(operator.outputs):
                return place + 1
        return 0

    def _position(self, operator: Any) -> int:
        return next(i for i, one in enumerate(self._graph.operators) if one is operator)

    def _insert(self, position: int, kind: str, source: int, made: int) -> None:
        operator = self._schema.OperatorT()
        operator.opcodeIndex = self._code(kind)
        operator.inputs, operator.outputs = [source], [made]
        options = getattr(self._schema, f"{kind.capitalize()}OptionsT")()
        operator.builtinOptions = options
        operator.builtinOptionsType = getattr(
            self._schema.BuiltinOptions, f"{kind.capitalize()}Options"
        )
        self._graph.operators.insert(position, operator)

    def _code(self, kind: str) -> int:
        number = getattr(self._schema.BuiltinOperator, kind)
        codes = self._model.operatorCodes
        for index, code in enumerate(codes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                return index
        made = self._schema.OperatorCodeT()
        # QUANTIZE of int8 exists since version 1, DEQUANTIZE per channel since version 5.
        made.builtinCode = made.deprecatedBuiltinCode = number
        made.version = 5 if kind == "DEQUANTIZE" else 1
        codes.append(made)
        return len(codes) - 1

    def _tensor(self, like: Any, suffix: str, kind: int) -> int:
        made = self._schema.TensorT()
        made.name = (like.name or b"") + f";{suffix}".encode()
        made.shape, made.shapeSignature = list(like.shape), like.shapeSignature
        made.hasRank, made.type, made.buffer = like.hasRank, kind, 0
        self._graph.tensors.append(made)
        return len(self._graph.tensors) - 1

    def _buffer(self, values: Array) -> int:
        """A buffer of these bytes; equal ones are stored once."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        key = hashlib.sha256(data.tobytes()).digest()
        if key not in self._buffers:
            made = self._schema.BufferT()
            made.data = data
            self._model.buffers.append(made)
            self._buffers[key] = len(self._model.buffers) - 1
        return self._buffers[key]

    def _on_grid(self, grid: Grid) -> Any:
        return self._grids(np.array([grid.scale]), np.array([grid.signed_zero_point]), 0)

    def _grids(self, scale: Array, zero_point: Array, axis: int) -> Any:
        made = self._schema.QuantizationParametersT()
        made.scale, made.zeroPoint = scale.astype(np.float32), zero_point.astype(np.int64)
        made.quantizedDimension = axis
        return made

    @staticmethod
    def _shape(tensor: Any) -> list[int]:
        return [] if tensor.shape is None else [int(size) for size in tensor.shape]


def _aligned(buffer: Any) -> Any:
    """The buffer, packed with its data aligned as the schema asks (the Python builder does not)."""

    class Aligned(type(buffer)):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:  # noqa: N802
            from ai_edge_litert import schema_py_generated as schema

            place = None
            if self.data is not None:
                data = np.asarray(self.data, dtype=np.uint8).tobytes()
                builder.StartVector(1, len(data), _ALIGNMENT)
                builder.head = builder.head - len(data)
                builder.Bytes[builder.head : builder.head + len(data)] = data
                place = builder.EndVector()
            schema.BufferStart(builder)
            if place is not None:
                schema.BufferAddData(builder, place)
            return schema.BufferEnd(builder)

    return Aligned(buffer.data)
