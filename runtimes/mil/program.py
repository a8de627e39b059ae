"""Reads a saved .mlpackage: functions, operations, constants, and what its edges accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical, mlpackage
from diffoundry.formats.mil_weights import REMEDY
from diffoundry.runtimes.mil.weights import (
    Blob,
    BlobFile,
    Constant,
    TensorType,
    decode,
    numpy_dtype,
)

_MODEL_PATH = "@model_path/"
_TYPE_NAMES = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64"}


@dataclass(frozen=True)
class Operation:
    """One operation. An argument is the name of a value, or a constant; some take several."""

    kind: str
    name: str
    arguments: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    has_blocks: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(frozen=True)
class Edge:
    """An input or output of the model as its description states it.

    `shapes` lists the shapes allowed (empty: see `ranges`); `ranges` holds (lowest, highest) per
    dimension, highest None where there is no limit; both empty: any shape. `image` is the colour
    layout ("RGB", "BGR", "GRAYSCALE", …) of an image edge.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    image: str = ""

    def allows(self, shape: tuple[int, ...]) -> bool:
        if self.shapes:
            return shape in self.shapes
        if self.ranges:
            return len(shape) == len(self.ranges) and all(
                low <= size and (high is None or size <= high)
                for size, (low, high) in zip(shape, self.ranges, strict=True)
            )
        return True

    def __str__(self) -> str:
        if self.shapes:
            return f"{self.name}: " + " or ".join(str(list(shape)) for shape in self.shapes)
        bounds = [f"{low}..{'' if high is None else high}" for low, high in self.ranges]
        return f"{self.name}: [{', '.join(bounds)}]"


@dataclass(frozen=True)
class Function:
    """A function of the program, in execution order, without its constants."""

    name: str
    opset: str
    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[str, Constant]
    edges_in: tuple[Edge, ...]
    edges_out: tuple[Edge, ...]

    def problems_with(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Why these input shapes are not for this function."""
        wrong = {edge.name for edge in self.edges_in if not edge.allows(shapes[edge.name])}
        wrong |= {name for name, kind in self.inputs if not kind.fits(shapes[name])}
        return [f"{name} is {list(shapes[name])}" for name in sorted(wrong)]


@dataclass(frozen=True)
class Program:
    """A package's functions, the default one first."""

    path: Path
    functions: tuple[Function, ...]


def load(path: Path) -> Program:
    """Read an `mlpackage` artifact (the package, or the folder that holds it).

    Raises ArtifactError for one that is damaged, has another's weights, or is no ML program.
    """
    mlpackage.validate(path)
    spec = mlpackage.read_spec(path)
    reader = _Reader(mlpackage.spec_file(path).parent)
    found = spec.mlProgram.functions
    default = spec.description.defaultFunctionName or "main"
    names = sorted(found, key=lambda name: (name != default, name))
    functions = tuple(reader.function(name, found[name], spec) for name in names)
    return Program(path, functions)


class _Reader:
    """Turns the parts of the protobuf into ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs: dict[str, BlobFile] = {}

    def function(self, name: str, proto: Any, spec: Any) -> Function:
        block = proto.block_specializations.get(proto.opset)
        if block is None:
            raise ArtifactError(f"function {name!r}", expected=f"a block for {proto.opset}",
                                found="none", remedy=REMEDY)  # fmt: skip
        constants: dict[str, Constant] = {}
        operations = []
        for one in block.operations:
            if one.type == "const":
                constants[one.outputs[0].name] = self.constant(one.attributes["val"])
            else:
                operations.append(self.operation(one))
        described = next((f for f in spec.description.functions if f.name == name),
                         spec.description)  # fmt: skip
        return Function(
            name,
            proto.opset,
            tuple((value.name, tensor_type(value.type)) for value in proto.inputs),
            tuple(block.outputs),
            tuple(operations),
            constants,
            tuple(_edge(feature) for feature in described.input),
            tuple(_edge(feature) for feature in described.output),
        )

    def operation(self, proto: Any) -> Operation:
        arguments = {
            key: tuple(
                binding.name
                if binding.WhichOneof("binding") == "name"
                else self.constant(binding.value)
                for binding in argument.arguments
            )
            for key, argument in proto.inputs.items()
        }
        name = proto.outputs[0].name if proto.outputs else ""
        for key, value in proto.attributes.items():
            if key == "name":
                name = name or str(self.constant(value).immediate)
            else:  # Before iOS 18 the compressed weights keep their parts in attributes.
                arguments[key] = (self.constant(value),)
        outputs = tuple((value.name, tensor_type(value.type)) for value in proto.outputs)
        return Operation(proto.type, name, arguments, outputs, bool(proto.blocks))

    def constant(self, value: Any) -> Constant:
        if value.WhichOneof("value") == "blobFileValue":
            blob = Blob(self.blob_file(value.blobFileValue.fileName), value.blobFileValue.offset)
            return Constant(tensor_type(value.type), blob=blob)
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            values = tuple(self.constant(one).immediate for one in immediate.list.values)
            return Constant(TensorType("list"), values)
        kind = tensor_type(value.type)
        return Constant(kind, _immediate(immediate.tensor, kind))

    def blob_file(self, name: str) -> BlobFile:
        relative = name.removeprefix(_MODEL_PATH)
        if relative not in self.blobs:
            self.blobs[relative] = BlobFile(canonical.inside(self.folder, relative))
        return self.blobs[relative]


def _immediate(tensor: Any, kind: TensorType) -> Any:
    """The value that stands in the program itself: a str, strings, or an array."""
    import numpy as np

    values = getattr(tensor, tensor.WhichOneof("value") or "ints").values
    if kind.dtype == "string":
        return values[0] if not kind.shape else tuple(values)
    if isinstance(values, bytes):
        return decode(values, kind.dtype, kind.shape)
    return np.array(values, numpy_dtype(kind.dtype)).reshape([d or 0 for d in kind.shape])


def tensor_type(proto: Any) -> TensorType:
    """A value's type; a list, dictionary or state shows as the dtype "list", …"""
    which = proto.WhichOneof("type")
    if which != "tensorType":
        return TensorType(which.removesuffix("Type") if which else "nothing")
    from coremltools.proto import MIL_pb2

    tensor = proto.tensorType
    name = MIL_pb2.DataType.Name(tensor.dataType)
    shape = tuple(
        dim.constant.size if dim.WhichOneof("dimension") == "constant" else None
        for dim in tensor.dimensions
    )
    return TensorType(_TYPE_NAMES.get(name, name.lower()), shape)


def _edge(feature: Any) -> Edge:
    kind = feature.type
    if kind.WhichOneof("Type") == "imageType":
        image = kind.imageType
        from coremltools.proto import FeatureTypes_pb2

        layout = FeatureTypes_pb2.ImageFeatureType.ColorSpace.Name(image.colorSpace)
        return Edge(feature.name, image=layout)
    array = kind.multiArrayType
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "enumeratedShapes":
        shapes = array.enumeratedShapes.shapes
        return Edge(feature.name, tuple(tuple(shape.shape) for shape in shapes))
    if flexible == "shapeRange":
        ranges = array.shapeRange.sizeRanges
        # Core ML writes "no limit" as a negative upper bound.
        bounds = ((r.lowerBound, r.upperBound if r.upperBound > 0 else None) for r in ranges)
        return Edge(feature.name, ranges=tuple(bounds))
    return Edge(feature.name, (tuple(array.shape),) if array.shape else ())
