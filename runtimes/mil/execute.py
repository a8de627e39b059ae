"""Runs a function of a MIL program, operation by operation.

fp16: an operand is read as it is stored, computed with in float32 (sums are accumulated in
float32), and the result is rounded to the type that the program states, half to even; what does
not fit becomes infinite. Integers keep their type; sub-byte integers are held in eight bits,
unsigned 16 and 32 bit integers in the next larger signed type.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffoundry.errors import ArtifactError
from diffoundry.runtimes.mil.program import Function, Operation
from diffoundry.runtimes.mil.registry import Entry, operations
from diffoundry.runtimes.mil.weights import Constant, TensorType

Values = dict[str, Tensor]

STORED = {
    "fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8,
    "int16": torch.int16, "int32": torch.int32, "uint8": torch.uint8, "uint16": torch.int32,
    "uint32": torch.int64, "int4": torch.int8, "uint1": torch.uint8, "uint2": torch.uint8,
    "uint3": torch.uint8, "uint4": torch.uint8, "uint6": torch.uint8,
}  # fmt: skip
OPSETS = tuple(f"CoreML{n}" for n in range(5, 10))
"""iOS 15 to iOS 26: those whose operations are defined in coremltools 9.0."""
_NOT_A_VALUE = ("Tensor", "Tensors")


@dataclass(frozen=True)
class Step:
    """An operation ready to run: plain arguments are read once, tensors are looked up by name."""

    operation: Operation
    entry: Entry
    plain: Mapping[str, Any]
    free: tuple[str, ...]


class Interpreter:
    """A function that can be run at any shape it allows. Keeps no copy of the weights."""

    def __init__(self, function: Function, where: str) -> None:
        """Raises ArtifactError that names every operation and type it does not know."""
        self.function, self._where = function, where
        known = operations()
        refuse_unknown(function, known, where)
        self._opset = int(function.opset.removeprefix("CoreML"))
        last_use = _last_uses(function)
        steps = [
            Step(op, known[op.kind], self._plain(op, known[op.kind]), last_use.get(number, ()))
            for number, op in enumerate(function.operations)
        ]
        self._steps = [step for step in steps if not is_constexpr(step.operation)]
        # Compressed weights are unpacked when they are used, and dropped after it.
        self._unpacked_by = {
            name: (step, position)
            for step in steps
            if is_constexpr(step.operation)
            for position, (name, _) in enumerate(step.operation.outputs)
        }

    def value_names(self) -> list[str]:
        """Every value that an operation computes, in execution order (no constants)."""
        return [name for step in self._steps for name, _ in step.operation.outputs]

    def run(self, feeds: Values, wanted: Collection[str], threads: int = 0) -> Values:
        """The values called `wanted`, in execution order. `feeds` have the program's types."""
        values, found = dict(feeds), {}
        with settings(threads), torch.inference_mode():
            for step in self._steps:
                for name, value in zip(
                    (name for name, _ in step.operation.outputs), self._compute(step, values),
                    strict=True,
                ):  # fmt: skip
                    values[name] = value
                    if name in wanted:
                        found[name] = value
                for name in step.free:
                    del values[name]
            for name in wanted:  # an input or a constant may be an output too
                if name not in found:
                    found[name] = self._tensor(name, values)
        return found

    def _compute(self, step: Step, values: Values) -> list[Tensor]:
        """Run one operation. Raises ArtifactError that names it."""
        op, entry = step.operation, step.entry
        arguments = dict(step.plain)
        for name, given in op.arguments.items():
            if name not in arguments:
                tensors = tuple(self._tensor(one, values) for one in given)
                arguments[name] = _passed(tensors, entry.parameters[name].form, entry.moves_data)
        try:
            result = entry.function(**arguments)
            results = result if isinstance(result, tuple) else (result,)
            return [
                _stored(value, kind) for value, (_, kind) in zip(results, op.outputs, strict=True)
            ]
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self._where}: operation {op}",
                expected="; ".join(f"{name}: {kind}" for name, kind in op.outputs),
                found=f"{type(error).__name__}: {str(error).strip()[:300]}",
                remedy="use a shape that this program was made for, or build it again",
            ) from error

    def _tensor(self, source: str | Constant, values: Values) -> Tensor:
        if isinstance(source, Constant):
            return _from_constant(source)
        if source in values:
            return values[source]
        if source in self._unpacked_by:
            step, position = self._unpacked_by[source]
            return self._compute(step, values)[position]
        return _from_constant(self.function.constants[source])

    def _plain(self, op: Operation, entry: Entry) -> dict[str, Any]:
        """The arguments that are plain values and constant, and the opset."""
        found: dict[str, Any] = {"opset": self._opset} if entry.takes_opset else {}
        for name, given in op.arguments.items():
            form = entry.parameters[name].form
            constants = [self._constant(one) for one in given]
            if form == "str":
                found[name] = str(constants[0].value()) if constants[0] else ""
            elif form not in _NOT_A_VALUE and all(constants):
                tensors = tuple(_from_constant(one) for one in constants if one)
                found[name] = _passed(tensors, form, moves_data=False)
        return found

    def _constant(self, source: str | Constant) -> Constant | None:
        return source if isinstance(source, Constant) else self.function.constants.get(source)


def is_constexpr(op: Operation) -> bool:
    return op.kind.startswith("constexpr_")


def refuse_unknown(function: Function, known: Mapping[str, Entry], where: str) -> None:
    """Raise ArtifactError with every operation, argument and type that is not known, by place."""
    places: dict[str, list[str]] = {}
    if function.opset not in OPSETS:
        places[f"opset {function.opset}"] = [function.name]
    for op in function.operations:
        for problem in _problems(op, known.get(op.kind)):
            places.setdefault(problem, []).append(op.name)
    for name, kind in function.inputs:
        if kind.dtype not in STORED:
            places.setdefault(f"input of type {kind.dtype}", []).append(name)
    if places:
        raise ArtifactError(
            f"{where}: function {function.name!r} has what the reference interpreter does not know",
            expected="operations of diffoundry.runtimes.mil",
            found="; ".join(f"{what} at {', '.join(at)}" for what, at in sorted(places.items())),
            remedy="check this package on a Mac (coreml_native), or change the model or its export",
        )


def _problems(op: Operation, entry: Entry | None) -> list[str]:
    if entry is None or op.has_blocks:
        return [f"operation {op.kind}"]
    unknown = set(op.arguments) - set(entry.parameters)
    needed = {
        name for name, p in entry.parameters.items() if p.required and p.form != "Opset"
    }  # fmt: skip
    return [
        *(f"argument {name} of {op.kind}" for name in sorted(unknown)),
        *(f"{op.kind} without {name}" for name in sorted(needed - set(op.arguments))),
        *(f"type {kind.dtype}" for _, kind in op.outputs if kind.dtype not in STORED),
    ]


def _last_uses(function: Function) -> dict[int, tuple[str, ...]]:
    """Number of an operation -> the values that no later operation reads and no output is."""
    last: dict[str, int] = {}
    for number, op in enumerate(function.operations):
        if is_constexpr(op):
            continue
        last |= {name: number for name, _ in op.outputs}
        last |= {
            one: number
            for given in op.arguments.values()
            for one in given
            if isinstance(one, str) and one in last
        }
    freed: dict[int, tuple[str, ...]] = {}
    for name, number in last.items():
        if name not in function.outputs:
            freed[number] = (*freed.get(number, ()), name)
    return freed


def _passed(tensors: tuple[Tensor, ...], form: str, moves_data: bool) -> Any:
    """The argument as the function's annotation asks for it."""
    if form in _NOT_A_VALUE:
        if not moves_data:
            tensors = tuple(t.float() if t.dtype == torch.float16 else t for t in tensors)
        return tensors if form == "Tensors" else tensors[0]
    values = tensors[0].reshape(-1).tolist()
    if form in ("Ints", "Bools"):
        return tuple(int(v) if form == "Ints" else bool(v) for v in values)
    return {"int": int, "float": float, "bool": bool}[form](values[0])


def _stored(value: Tensor, kind: TensorType) -> Tensor:
    """The value in the type that the program states. Raises ValueError for another shape."""
    if not kind.fits(value.shape):
        raise ValueError(f"the result is {list(value.shape)}, the program states {kind}")
    return value.to(STORED[kind.dtype])


def _from_constant(constant: Constant) -> Tensor:
    """The constant as it is stored: a view of the memory-mapped file where it lies there."""
    array = constant.value()
    wide = {"uint16": "int32", "uint32": "int64"}.get(str(array.dtype))
    if wide is not None:
        array = array.astype(wide)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@contextmanager
def settings(threads: int) -> Iterator[None]:
    """Full float32 products and `threads` threads (0: torch's choice) inside, as it was after."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])
