"""Writes an ONNX model as OpenVINO IR.

From ONNX, not from the exported program: the export is shared with every other target, layers
keep the names of the network's modules, and no second decomposition by torch is needed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

from diffoundry.errors import ProfileError, StageError
from diffoundry.exporters.openvino_repairs import give_biases, keep_angles
from diffoundry.formats import onnx, openvino
from diffoundry.types import (
    BF16,
    INT8,
    Artifact,
    ArtifactType,
    Axis,
    Contract,
    Dim,
    Memory,
    Precision,
    Produced,
    ShapePolicy,
    StageContext,
    TensorSpec,
)

HALVES: tuple[Precision, ...] = ("fp16", *BF16)
"""Where weights or arithmetic have fewer bits than float32."""


@dataclass(frozen=True)
class OpenvinoFromOnnx:
    """Stage: onnx (fp32, or int8 written as Q/DQ) -> openvino.

    `precision`: "fp32" keeps every weight, "fp16" rounds the weights to half the space; what
    they are multiplied with stays float32 either way. "bf16" stores them like "fp16", and our
    runtime lets a CPU that has bfloat16 units compute with those. "int8" takes an ONNX model with
    Q/DQ, keeps its INT8 weights, and rounds no other; "int8_bf16" does the same for a runtime that
    computes all other layers in bfloat16. Sines and cosines, and what they are taken of, stay
    float32 (see `openvino_repairs.keep_angles`).
    `shape_policy`: dynamic sizes are bounded by the contract's axes, fixed ones are constants.
    """

    precision: Precision = "fp32"
    shape_policy: ShapePolicy = field(default_factory=ShapePolicy)

    tools: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "build,onnx,openvino"
    memory: ClassVar[Memory] = Memory(libraries=950 << 20, weights=1.1, activations=0)

    def __post_init__(self) -> None:
        known = get_args(Precision)
        if self.precision not in known:
            raise ProfileError(
                "openvino_from_onnx: precision",
                expected=" or ".join(known),
                found=str(self.precision),
            )
        if isinstance(self.shape_policy, Mapping):  # options may come as plain data
            object.__setattr__(self, "shape_policy", ShapePolicy(**self.shape_policy))

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        return {"model": (ArtifactType("onnx", self._source),)}

    def outputs(self) -> Mapping[str, ArtifactType]:
        return {"model": ArtifactType("openvino", self.precision)}

    @property
    def _source(self) -> Precision:
        return "int8" if self.precision in INT8 else "fp32"

    def run(self, inputs: Mapping[str, Artifact], context: StageContext) -> Mapping[str, Produced]:
        """Convert, name and bound the edges, save, canonicalise. Raises StageError."""
        contract, source = context.contract, inputs["model"]
        if contract is None:
            raise StageError("openvino_from_onnx", expected="a component's contract",
                             found="none")  # fmt: skip
        if source.type.precision not in (None, self._source):
            raise StageError(
                f"openvino_from_onnx: {contract.component}",
                expected=f"an {self._source} ONNX model",
                found=f"{source.type.precision}",
                remedy="leave precision out of the ONNX stage; this stage has its own"
                if self._source == "fp32"
                else "put quantize_onnx before this stage",
            )
        context.say(f"converting {contract.component} to OpenVINO IR")
        model = _convert(source, contract)
        if self.precision in INT8:
            give_biases(model)
        if self.precision in HALVES:
            keep_angles(model)
        _check_edges(model, contract)
        _bound_shapes(model, contract, self.shape_policy)
        model.set_friendly_name(contract.component)
        target = context.work / "model"
        target.mkdir()
        openvino.import_openvino().save_model(
            model, openvino.model_file(target), compress_to_fp16=self.precision in ("fp16", "bf16")
        )
        openvino.canonicalise(target)
        openvino.validate(target)
        _check_integers(source, target, contract)
        return {"model": Produced(target)}


def _convert(source: Artifact, contract: Contract) -> Any:
    """The converted model. Raises StageError with what OpenVINO says."""
    package = openvino.import_openvino()
    try:
        with _without_comma(source.path) as folder:
            return package.convert_model(str(onnx.model_file(folder)))
    except _failures(package) as error:
        raise StageError(
            f"openvino_from_onnx: {contract.component}",
            expected=f"a model whose operators OpenVINO {_version(package)} converts",
            found=_short(error),
            remedy='give quantize_onnx form = "qdq"'
            if source.type.precision == "int8"
            else "export with another opset, or report the operator",
        ) from error


@contextlib.contextmanager
def _without_comma(folder: Path) -> Iterator[Path]:
    """The same folder under a path that OpenVINO's converter does not split in two."""
    if "," not in str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="diffoundry-") as scratch:
        link = Path(scratch) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def _check_integers(source: Artifact, target: Path, contract: Contract) -> None:
    """Raise StageError where a layer is INT8 in one of the two files only."""
    expected = onnx.integer_layers(source.path)
    found = openvino.integer_layers(target)
    if found != expected:
        differ = [
            f"{name}: {found.get(name, 'float')}, was {expected.get(name, 'float')}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        raise StageError(
            f"openvino_from_onnx: {contract.component}",
            expected="the INT8 layers of the ONNX model",
            found="; ".join(differ),
            remedy='give quantize_onnx form = "qdq"',
        )


def _failures(package: Any) -> tuple[type[Exception], ...]:
    """What the converter raises; most of it is no RuntimeError."""
    names = ("GeneralFailure", "InitializationFailure", "NotImplementedFailure",
             "OpConversionFailure", "OpValidationFailure")  # fmt: skip
    return (RuntimeError, *(getattr(package.frontend, name) for name in names))


def _version(package: Any) -> str:
    return str(package.__version__).split("-")[0]


def _short(error: BaseException) -> str:
    """OpenVINO's message without the lines that name its own source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Check '", "Exception from"))]
    return " ".join(kept or lines)[:600]


def _check_edges(model: Any, contract: Contract) -> None:
    """Hold names and element types of the edges against the contract, and leave no other name.

    Raises StageError where an input or output was lost, or changed its type.
    """
    for what, ports, specs in (
        ("inputs", model.inputs, contract.inputs),
        ("outputs", model.outputs, contract.outputs),
    ):
        found = [_edge(port, specs) for port in ports]
        expected = [f"{spec.name}: {spec.dtype}" for spec in specs]
        if found != expected:
            raise StageError(
                f"{contract.component}: the converted model's {what}",
                expected=", ".join(expected),
                found=", ".join(found),
                remedy="an input that the model does not use may not be in its contract",
            )
        for port, spec in zip(ports, specs, strict=True):
            port.get_tensor().set_names({spec.name})


def _edge(port: Any, specs: tuple[TensorSpec, ...]) -> str:
    """ "name: dtype" of an edge, by the name that the contract knows, if it has that."""
    names = port.get_names()
    known = [spec.name for spec in specs if spec.name in names]
    name = known[0] if known else ", ".join(sorted(names)) or "no name"
    return f"{name}: {port.get_element_type().to_dtype().name}"


def _bound_shapes(model: Any, contract: Contract, policy: ShapePolicy) -> None:
    shapes = {
        spec.name: [_bounds(dim, contract, policy) for dim in spec.dims] for spec in contract.inputs
    }
    partial = openvino.import_openvino().PartialShape
    try:
        model.reshape({name: partial(dims) for name, dims in shapes.items()})
    except RuntimeError as error:
        raise StageError(
            f"openvino_from_onnx: {contract.component}",
            expected=f"a model that takes {shapes}",
            found=_short(error),
            remedy="give both stages of the route the same shapes",
        ) from error


def _bounds(dim: Dim, contract: Contract, policy: ShapePolicy) -> Any:
    """One size, or the smallest and largest that the policy allows."""
    if isinstance(dim, int):
        return dim
    axis: Axis = contract.axis(dim.axis)
    values = (axis.min, axis.max)
    if policy.kind != "dynamic":
        values = tuple(dict(shape)[dim.axis] for shape in policy.shapes)  # type: ignore[assignment]
    low, high = (dim.size({dim.axis: value}) for value in (min(values), max(values)))
    return low if low == high else openvino.import_openvino().Dimension(low, high)
