"""The few types everything is made of: axes, contracts, artifacts, stages, sessions.

Nothing heavy is imported here; arrays are numpy arrays by protocol (`shape`, `dtype`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from diffoundry.errors import ContractError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
else:
    Array = Any

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8_bf16"]
"""What an engine computes in; "int8_bf16": planned layers in INT8, all others in bfloat16."""

INT8: tuple[Precision, ...] = ("int8", "int8_bf16")
"""The precisions of engines that follow a quantization plan."""

BF16: tuple[Precision, ...] = ("bf16", "int8_bf16")
"""The precisions of engines that compute in bfloat16 where the processor has units for it."""
Shape = Mapping[str, int]
"""Axis values of one concrete call, for example `{"batch": 1, "height": 64, "width": 64}`."""


@dataclass(frozen=True)
class Axis:
    """A named size that may vary between calls; height and width count pixels.

    `multiple_of` comes from the model: VAE factor × 2^(U-Net levels − 1) for pixels.
    """

    name: str
    min: int
    opt: int
    max: int
    multiple_of: int = 1

    def problem_with(self, value: int) -> str | None:
        """Say why `value` is not allowed on this axis, or None."""
        if not self.min <= value <= self.max:
            return f"{self.name}={value} is outside {self.min}..{self.max}"
        if value % self.multiple_of:
            return f"{self.name}={value} is not a multiple of {self.multiple_of}"
        return None


@dataclass(frozen=True)
class AxisRef:
    """A dimension that follows an axis: axis value × factor / divisor."""

    axis: str
    divisor: int = 1
    factor: int = 1

    def size(self, shape: Shape) -> int:
        return shape[self.axis] * self.factor // self.divisor

    def __str__(self) -> str:
        text = self.axis if self.factor == 1 else f"{self.factor}*{self.axis}"
        return text if self.divisor == 1 else f"{text}/{self.divisor}"


Dim = int | AxisRef


@dataclass(frozen=True)
class Quantization:
    """Scale and zero point of an integer edge: real = scale × (stored − zero_point)."""

    scale: float
    zero_point: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output. `dtype` is numpy's name ("float32", "int64")."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    description: str = ""
    quantization: Quantization | None = None

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """The concrete dimensions at the given axis values."""
        return tuple(d if isinstance(d, int) else d.size(shape) for d in self.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.dims)}]"


@dataclass(frozen=True)
class Contract:
    """What a component takes and gives: flat, named tensors over named axes."""

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]

    def axis(self, name: str) -> Axis:
        return next(axis for axis in self.axes if axis.name == name)

    def opt_shape(self) -> dict[str, int]:
        """The usual shape."""
        return {axis.name: axis.opt for axis in self.axes}

    def check_feeds(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """Check names, dtypes and shapes of `feeds`; return the axis values they imply.

        Raises ContractError that lists everything that does not fit.
        """
        shape: dict[str, int] = {}
        problems = _name_problems("input", [s.name for s in self.inputs], list(feeds))
        for spec in self.inputs:
            if spec.name in feeds:
                problems += _tensor_problems(spec, feeds[spec.name], shape)
        for axis in self.axes:
            problem = axis.problem_with(shape[axis.name]) if axis.name in shape else None
            if problem:
                problems.append(problem)
        self._raise(problems, "feeds", self.inputs, feeds)
        return shape

    def check_outputs(self, outputs: Mapping[str, Array], shape: Shape) -> None:
        """Check that `outputs` are all there with the shapes that `shape` implies."""
        problems = _name_problems("output", [s.name for s in self.outputs], list(outputs))
        for spec in self.outputs:
            if spec.name in outputs:
                problems += _tensor_problems(spec, outputs[spec.name], dict(shape))
        self._raise(problems, "outputs", self.outputs, outputs)

    def _raise(
        self,
        problems: list[str],
        what: str,
        specs: Sequence[TensorSpec],
        arrays: Mapping[str, Array],
    ) -> None:
        if problems:
            received = "; ".join(
                f"{name}: {array.dtype}{list(array.shape)}" for name, array in arrays.items()
            )
            raise ContractError(
                f"{self.component}: {what} do not fit the contract ({'; '.join(problems)})",
                expected="; ".join(str(spec) for spec in specs),
                found=received or "nothing",
                remedy="pass exactly the named tensors with these dtypes and shapes",
            )


def _name_problems(what: str, expected: list[str], found: list[str]) -> list[str]:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    problems = [f"{what} {name!r} is missing" for name in missing]
    return problems + [f"unknown {what} {name!r}" for name in unknown]


def _tensor_problems(spec: TensorSpec, array: Array, shape: dict[str, int]) -> list[str]:
    """Check one array against its spec, solving axes into `shape` as they are met."""
    problems = []
    if str(array.dtype) != spec.dtype:
        problems.append(f"{spec.name} is {array.dtype}, not {spec.dtype}")
    if len(array.shape) != len(spec.dims):
        return [*problems, f"{spec.name} has {len(array.shape)} dimensions, not {len(spec.dims)}"]
    for position, (dim, size) in enumerate(zip(spec.dims, array.shape, strict=True)):
        if isinstance(dim, int):
            if size != dim:
                problems.append(f"{spec.name} dimension {position} is {size}, not {dim}")
            continue
        if dim.axis not in shape and size * dim.divisor % dim.factor == 0:
            shape[dim.axis] = size * dim.divisor // dim.factor
        if dim.axis not in shape or dim.size(shape) != size:
            problems.append(f"{spec.name} dimension {position} is {size}, which is not {dim}")
    return problems


@dataclass(frozen=True)
class ShapePolicy:
    """Which shapes an artifact runs at.

    dynamic: every shape the contract's axes allow. enumerated: exactly `shapes`.
    fixed: exactly one. Shapes are kept as sorted (axis, value) pairs; a component that lacks an
    axis (a text encoder has no height) is not held to it.
    """

    kind: Literal["dynamic", "enumerated", "fixed"] = "dynamic"
    shapes: tuple[tuple[tuple[str, int], ...], ...] = ()

    def allows(self, shape: Shape) -> bool:
        return self.kind == "dynamic" or any(shape.items() <= dict(s).items() for s in self.shapes)


@dataclass(frozen=True)
class ArtifactType:
    """Kind ("onnx", "torch_module", …), precision and shape policy of an artifact."""

    kind: str
    precision: Precision | None = None
    shape_policy: ShapePolicy | None = None


@dataclass(frozen=True)
class Artifact:
    """A file or folder with a type and the digest of its contents.

    `digest` is "sha256:<hex>". `lineage` lists the keys of the stages that led here, oldest
    first. `contract` is the engine's own contract where it differs by format (int32 edges, INT8
    edges), else the component's.
    """

    type: ArtifactType
    path: Path
    digest: str
    component: str | None = None
    variant: str | None = None
    lineage: tuple[str, ...] = ()
    contract: Contract | None = None


@dataclass(frozen=True)
class Produced:
    """What a stage's run returns for one named output: a path inside its work folder."""

    path: Path
    contract: Contract | None = None


@dataclass
class StageContext:
    """What a stage may use besides its inputs.

    `work` is an empty folder to write into. `contract` is the component's contract over the
    build's axes (None for stages that see the whole pipeline, which find every component's in
    `contracts`). `journal` is a file that outlives an interrupted run of the very same stage, for
    one that writes down as it goes; it is gone once the stage is done. `say` reports progress in
    one short line.
    """

    work: Path
    component: str | None = None
    contract: Contract | None = None
    contracts: Mapping[str, Contract] = field(default_factory=dict)
    threads: int = 2
    journal: Path | None = None
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Memory:
    """What a stage's process holds at most: a forecast that builds are planned with.

    `libraries`: bytes that do not grow. `weights`: times the component's weights in float32.
    `activations`: times its widest activation at the usual shape (`planning.memory`).
    """

    libraries: int = 800 << 20
    weights: float = 2.2
    activations: float = 6.0


@runtime_checkable
class Stage(Protocol):
    """Turns named artifacts into named artifacts. Options are the fields of a frozen dataclass.

    A stage class is a frozen dataclass found by listing `exporters/`, `compilers/` and
    `core/stages/`. Its name is its module's name.
    """

    tools: ClassVar[tuple[str, ...]]
    """Distributions whose versions belong in the key."""
    extra: ClassVar[str]
    """The extra of pyproject.toml that installs its tools. A stage whose converter traces the
    module once more by itself also says `retraces = True`: builds count that and show it; one whose
    peak memory was measured says `memory = Memory(...)`; one whose new module is the same function
    to rounding says `exact = True`: what it is in is not lossy, and its fp32 proof holds it too."""

    def inputs(self) -> Mapping[str, tuple[ArtifactType, ...]]:
        """Name of each input -> the artifact types it accepts (None fields match anything)."""
        ...

    def outputs(self) -> Mapping[str, ArtifactType]:
        """Name of each output -> the artifact type it will have."""
        ...

    def run(
        self, inputs: Mapping[str, Artifact], context: StageContext
    ) -> Mapping[str, Produced]: ...


class Session(Protocol):
    """An artifact opened by a runtime: named numpy arrays in, named numpy arrays out."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Intermediate values by name in execution order (all when `names` is None).

        Raises NotSupported (a ContractError) where the format does not allow it.
        """
        ...

    def precision_used(self) -> dict[str, Any]:
        """What the runtime really computes in, read back from it."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Runtime(Protocol):
    """One adapter a file. An instance is found by listing `runtimes/`; its name is its module's."""

    tools: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]

    def accepts(self, artifact_type: ArtifactType) -> bool: ...

    def unavailable(self, device: str) -> Exception | None:
        """MissingToolError or DeferredError when it cannot run here on `device`, else None."""
        ...

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> Session: ...


@dataclass(frozen=True)
class StandIn:
    """Another runtime that can check an artifact on a host that its own runtime cannot be on.

    `artifact` is what `runtime` opens there: the same file, or what the engine is built from, in
    the same precision. `note` is one sentence: what such a check proves, and what it does not.
    """

    runtime: str
    artifact: Artifact
    note: str
    device: str = "cpu"


@runtime_checkable
class HasStandIn(Protocol):
    """What a runtime may add, where its artifacts can be checked without it.

    Asked only where `unavailable` gives a DeferredError. `stand_ins` names every runtime that
    `stand_in` may answer with: their sources and tools are part of a check's key.
    """

    stand_ins: ClassVar[tuple[str, ...]]

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """The stand-in for this artifact, or None. Raises ArtifactError for a damaged one."""
        ...


@dataclass(frozen=True)
class Limits:
    """What a parity check allows. None means: not limited by this figure.

    max_abs ≤ max(peak_factor × peak, floor_factor × floor) when `peak_factor` is set; the other
    fields are absolute.
    """

    peak_factor: float | None = None
    floor_factor: float = 10.0
    max_abs: float | None = None
    cosine: float | None = None
    psnr_db: float | None = None
    sqnr_db: float | None = None
    ssim: float | None = None
    prompt_accuracy_drop: float | None = None


@dataclass(frozen=True)
class Measure:
    """How one output differs from its reference (worst call of those compared)."""

    max_abs: float
    mean_abs: float
    cosine: float
    psnr_db: float
    sqnr_db: float
    peak: float
    floor: float | None = None


CheckStatus = Literal["passed", "failed", "deferred", "info"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the parity table.

    `level` is call, drift, plan, trajectory, image, nothing_dropped, shape_range, sick_numbers,
    precision or device (a stand-in ran the others: the check on the device itself is deferred).
    `status` "deferred" means it could not run on this host; "info" never decides.
    """

    level: str
    name: str
    status: CheckStatus
    component: str | None = None
    measure: Measure | None = None
    limits: Limits | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class ParityResult:
    """All checks of one engine or one variant. Fails closed: no checks is not a pass."""

    subject: str
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        statuses = [check.status for check in self.checks]
        return "passed" in statuses and all(s in ("passed", "info") for s in statuses)

    @property
    def failed(self) -> bool:
        statuses = [check.status for check in self.checks]
        return "failed" in statuses or all(s == "info" for s in statuses)
