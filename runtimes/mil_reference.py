"""Runs Core ML packages without a Mac: Diffoundry's own interpreter of MIL programs.

It computes in float32 and stores each value in the type that the program states, so that fp16
rounding and overflow show. It says nothing about the Neural Engine's own accumulation.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffoundry.errors import ArtifactError, ContractError, MissingToolError, UsageError
from diffoundry.formats import mlpackage
from diffoundry.runtimes.mil import program as mil_program
from diffoundry.types import Array, Artifact, ArtifactType, Contract, TensorSpec

if TYPE_CHECKING:
    from diffoundry.runtimes.mil.execute import Interpreter

NOTE = (
    "checked by the reference interpreter (fp32 arithmetic, fp16 storage), not on the device: "
    "the Neural Engine accumulates differently"
)
_LAST_LEVEL = 255


@dataclass(frozen=True)
class MilReference:
    """Runtime: mlpackage -> session, on any CPU."""

    tools: ClassVar[tuple[str, ...]] = ("torch", "coremltools", "numpy")
    extra: ClassVar[str] = "coreml"

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == mlpackage.KIND

    def unavailable(self, device: str) -> Exception | None:
        """MissingToolError without torch (extra build) or coremltools (extra coreml)."""
        if device != "cpu":
            return UsageError("mil_reference: device", expected="cpu", found=device)
        for tool, extra in (("torch", "build"), ("coremltools", "coreml")):
            if importlib.util.find_spec(tool) is None:
                return MissingToolError(f"mil_reference needs {tool}",
                                        expected=f"the extra {extra!r}", found="not installed",
                                        remedy=f"pip install 'diffoundry[{extra}]'")  # fmt: skip
        return None

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedMil:
        """Read the saved package. Raises ArtifactError for one that is damaged, that has other
        inputs and outputs than `contract`, or operations that the interpreter does not know.
        """
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        if not self.accepts(artifact.type):
            raise ArtifactError(str(artifact.path), expected="an mlpackage artifact",
                                found=artifact.type.kind)  # fmt: skip
        mlpackage.validate(artifact.path)
        package = mlpackage.package(artifact.path)
        return OpenedMil(mil_program.load(package), contract, threads)


class OpenedMil:
    """A program that runs at each shape that its description allows."""

    def __init__(self, program: mil_program.Program, contract: Contract, threads: int = 0) -> None:
        from diffoundry.runtimes.mil.execute import Interpreter

        self._program, self._contract, self._threads = program, contract, threads
        self._functions: list[Interpreter] = []
        for function in program.functions:
            _check_names(program, function, contract)
            self._functions.append(Interpreter(function, str(program.path)))

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, with the contract's names and types. Raises ContractError for another shape."""
        interpreter, tensors = self._prepare(feeds)
        names = [spec.name for spec in self._contract.outputs]
        found = interpreter.run(tensors, names, self._threads)
        edges = {edge.name: edge for edge in interpreter.function.edges_out}
        return {
            spec.name: _at_the_edge(found[spec.name].numpy(), spec, bool(edges[spec.name].image))
            for spec in self._contract.outputs
        }

    def value_names(self) -> list[str]:
        """Every value that `probe` can read, in execution order (of the default function)."""
        return self._functions[0].value_names()

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Intermediate values by their MIL names, in execution order, in their stored types.

        Raises ContractError for a name that no operation computes.
        """
        interpreter, tensors = self._prepare(feeds)
        known = interpreter.value_names()
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            raise ContractError(f"probe of {', '.join(unknown)}",
                                expected="names of values that an operation computes",
                                found="unknown names")  # fmt: skip
        wanted = set(known if names is None else names)
        found = interpreter.run(tensors, wanted, self._threads)
        return {name: value.numpy() for name, value in found.items()}

    def precision_used(self) -> dict[str, Any]:
        """What was computed in, and how many values the program stores in each type.

        Keys: compute (a value stored in fp16 has fp16's precision, whatever it was computed in);
        arithmetic; storage; constants; threads; note.
        """
        import torch

        functions = [interpreter.function for interpreter in self._functions]
        values = (kind.dtype for f in functions for op in f.operations for _, kind in op.outputs)
        storage = _counted(values)
        halves = ["float16"] if "fp16" in storage else []
        return {
            "compute": ["float32", *halves],
            "arithmetic": "fp32",
            "storage": storage,
            "constants": _counted(c.type.dtype for f in functions for c in f.constants.values()),
            "threads": self._threads or torch.get_num_threads(),
            "note": NOTE,
        }

    def close(self) -> None:
        """Free the program and its weights."""
        self._functions.clear()
        self.__dict__.pop("_program", None)

    def _prepare(self, feeds: Mapping[str, Array]) -> tuple[Interpreter, dict[str, Any]]:
        """The function for these shapes, and the feeds in its types."""
        import numpy as np
        import torch

        from diffoundry.runtimes.mil.execute import STORED

        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        for interpreter in self._functions:
            function = interpreter.function
            if not function.problems_with(shapes):
                return interpreter, {
                    name: torch.from_numpy(np.array(feeds[name])).to(STORED[kind.dtype])
                    for name, kind in function.inputs
                }
        allowed = [edge for i in self._functions for edge in i.function.edges_in]
        problems = self._functions[0].function.problems_with(shapes)
        raise ContractError(
            f"{self._program.path}: no function takes these shapes ({'; '.join(problems)})",
            expected="; ".join(dict.fromkeys(str(edge) for edge in allowed)),
            found="; ".join(f"{name}: {list(shape)}" for name, shape in shapes.items()),
            remedy="use a shape that this engine was built for",
        )


def _check_names(
    program: mil_program.Program, function: mil_program.Function, contract: Contract
) -> None:
    """Raise ArtifactError where the function's edges are not the contract's."""
    inputs, outputs = {name for name, _ in function.inputs}, set(function.outputs)
    missing = [spec.name for spec in contract.outputs if spec.name not in outputs]
    if inputs != {spec.name for spec in contract.inputs} or missing:
        raise ArtifactError(
            f"{program.path}: function {function.name!r}",
            expected=f"{_names(contract.inputs)} -> {_names(contract.outputs)}",
            found=f"{', '.join(sorted(inputs))} -> {', '.join(sorted(outputs))}",
            remedy="open it as the component that it was built from",
        )


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(sorted(spec.name for spec in specs))


def _counted(dtypes: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(dtypes).items()))


def _at_the_edge(array: Array, spec: TensorSpec, image: bool) -> Array:
    """The output in the contract's type; an image goes through the bytes that Core ML hands over.

    Core ML writes values of 0..255 into a pixel buffer: rounded, and cut off at both ends.
    """
    import numpy as np

    if image:
        pixels = np.clip(np.rint(array.astype(np.float32)), 0, _LAST_LEVEL)
        array = mlpackage.from_pixels(pixels)
    return array.astype(spec.dtype)
