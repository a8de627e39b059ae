"""Opens TFLite models with LiteRT's interpreter: on the CPU by XNNPACK, or by another delegate."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    MissingToolError,
    UsageError,
)
from diffoundry.formats import tflite
from diffoundry.types import Array, Artifact, ArtifactType, Contract

_DELEGATES = {
    "gpu": "libtensorflowlite_gpu_delegate.so",
    "qnn": "libQnnTFLiteDelegate.so",
    "edgetpu": "libedgetpu.so.1",
}
"""Device -> the library of its delegate, as its maker names it."""
_MOST_THREADS = 4
"""More rarely helps on a phone, whose other cores are slow ones."""


@dataclass(frozen=True)
class TfliteInterpreter:
    """Runtime: tflite -> session, on "cpu" (XNNPACK), "gpu", "qnn" or "edgetpu"."""

    tools: ClassVar[tuple[str, ...]] = ("ai-edge-litert", "numpy")
    extra: ClassVar[str] = "tflite"

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == "tflite"

    def unavailable(self, device: str) -> Exception | None:
        """MissingToolError without ai-edge-litert, DeferredError without a delegate's library."""
        if device != "cpu" and device not in _DELEGATES:
            return UsageError("tflite_interpreter: device", found=device,
                              expected=" or ".join(["cpu", *_DELEGATES]))  # fmt: skip
        if importlib.util.find_spec("ai_edge_litert") is None:
            return MissingToolError(
                "tflite_interpreter needs ai-edge-litert",
                expected=f"the extra {self.extra!r}",
                found="not installed",
                remedy=f"pip install 'diffoundry[{self.extra}]'",
            )
        if device != "cpu" and not _loads(_DELEGATES[device]):
            return DeferredError(
                f"tflite_interpreter: device {device}",
                expected=f"the delegate {_DELEGATES[device]}",
                found="no such library on this host",
                remedy="complete this check on a device that has it",
            )
        return None

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedTflite:
        """Open with `threads` threads (0: as many as there are cores, at most four).

        Raises ArtifactError for another kind of file or a damaged model.
        """
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        if not self.accepts(artifact.type):
            raise ArtifactError(str(artifact.path), expected="a tflite artifact",
                                found=artifact.type.kind)  # fmt: skip
        tflite.validate(artifact.path)
        count = threads or min(_MOST_THREADS, os.cpu_count() or 1)
        return OpenedTflite(artifact.path, contract, device, count)


class OpenedTflite:
    """A model opened by LiteRT. The signature is the one whose shapes the feeds have."""

    def __init__(self, path: Path, contract: Contract, device: str, threads: int) -> None:
        self._path, self._contract = path, contract
        self._device, self._threads = device, threads
        self._signatures = {_shapes_of(one): one for one in tflite.read_signatures(path)}
        self._interpreter = self._open()
        self._runners: dict[str, Any] = {}

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ContractError for shapes that no signature has, and other dtypes."""
        signature = self._signature_for(feeds)
        if signature.name not in self._runners:
            runner = self._interpreter.get_signature_runner(signature.name)
            self._runners[signature.name] = runner
        return self._run(self._runners[signature.name], feeds)

    def value_names(self, feeds: Mapping[str, Array]) -> list[str]:
        """Every value that `probe` can read at the shapes of `feeds`, in execution order."""
        signature = self._signature_for(feeds)
        return [name for _, name in tflite.operations(self._path, signature.subgraph)]

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Intermediate values by name, in execution order, from LiteRT's own kernels.

        Without XNNPACK, which keeps none. Values have the layout of the file (images are
        [batch, height, width, channels] inside it), and the name of the layer that they come
        from. Raises ContractError for an unknown name.
        """
        signature = self._signature_for(feeds)
        values = tflite.operations(self._path, signature.subgraph)
        self._check_known(names, [name for _, name in values])
        interpreter = self._open(keep_values=True)
        self._run(interpreter.get_signature_runner(signature.name), feeds)
        wanted = None if names is None else set(names)
        return {
            name: interpreter.get_tensor(index, signature.subgraph)
            for index, name in values
            if wanted is None or name in wanted
        }

    def precision_used(self) -> dict[str, Any]:
        """What the interpreter computes in, from the file and the opened graph.

        Keys: compute (absent where a delegate does not say); delegate; partitions (groups of
        operations of the first signature that it took over); weights (bytes by dtype);
        fp16_allowed (XNNPACK computes in fp16 only where the file's metadata says that it may:
        the interpreter sets no such flag); threads; where the file has INT8 layers, on the CPU:
        integer_layers (those whose kernels multiply integers) and integer_kernels (whose kernels
        these are). Neither XNNPACK nor LiteRT has a float kernel for an INT8 weight: what is to be
        computed in float has a DEQUANTIZE before it in the file.
        """
        allowed = tflite.REDUCED_PRECISION in tflite.metadata_names(self._path)
        operations = self._interpreter._get_ops_details()
        taken = sum(one["op_name"] == "DELEGATE" for one in operations)
        used: dict[str, Any] = {
            "delegate": self._delegate_name(taken),
            "partitions": taken,
            "weights": tflite.weight_types(self._path),
            "fp16_allowed": allowed,
            "threads": self._threads,
        }
        if self._device == "cpu":
            used["compute"] = "float16" if allowed else "float32"
            used |= self._integers(operations)
        return used

    def _integers(self, operations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What `precision_used` says about INT8 layers, of the first signature."""
        schemes = tflite.integer_layers(self._path)
        if not schemes:
            return {}
        weights = tflite.integer_weights(self._path, 0)
        reads = {
            int(i) for one in operations for i in one["inputs"] if one["op_name"] == "DELEGATE"
        }
        kernels: dict[str, list[str]] = {"XNNPACK": [], "LiteRT": []}
        for index, layer in weights.items():
            if schemes[layer] in ("static", "dynamic"):
                kernels["XNNPACK" if index in reads else "LiteRT"].append(layer)
        found = sorted(layer for layers in kernels.values() for layer in layers)
        halves = {"compute": ["float32", "int8"]} if found else {}
        counts = {name: len(layers) for name, layers in kernels.items() if layers}
        return {**halves, "integer_layers": found, "integer_kernels": counts}

    def close(self) -> None:
        """Free the model."""
        self._runners.clear()
        self.__dict__.pop("_interpreter", None)

    def _delegate_name(self, taken: int) -> str:
        if not taken:
            return "none: LiteRT's own kernels"
        return "XNNPACK" if self._device == "cpu" else _DELEGATES[self._device]

    def _open(self, keep_values: bool = False) -> Any:
        """An interpreter with its tensors allocated. Raises ArtifactError where it refuses."""
        from ai_edge_litert import interpreter as litert

        kernels = litert.OpResolverType
        file = tflite.model_file(self._path)
        delegates = []
        try:
            with _without_notices(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that keeping every value takes memory
                if self._device != "cpu" and not keep_values:
                    delegates.append(litert.load_delegate(_DELEGATES[self._device]))
                opened = litert.Interpreter(
                    model_path=str(file),
                    num_threads=self._threads,
                    experimental_delegates=delegates,
                    experimental_preserve_all_tensors=keep_values,
                    experimental_op_resolver_type=(
                        kernels.BUILTIN_WITHOUT_DEFAULT_DELEGATES if keep_values else kernels.AUTO
                    ),
                )
                opened.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(
                str(file),
                expected=f"a model that LiteRT can run on {self._device}",
                found=str(error).strip()[:400],
                remedy="build it again, or install a newer ai-edge-litert",
            ) from error
        return opened

    def _signature_for(self, feeds: Mapping[str, Array]) -> tflite.Signature:
        """The signature with exactly these shapes: LiteRT itself would resize another one."""
        found = self._signatures.get(
            tuple(sorted((name, tuple(array.shape)) for name, array in feeds.items()))
        )
        if found is None:
            raise ContractError(
                f"{self._contract.component}: no signature has these shapes",
                expected="; ".join(
                    f"{one.name} ({', '.join(f'{n}: {list(t.shape)}' for n, t in sorted(one.inputs.items()))})"  # noqa: E501
                    for one in self._signatures.values()
                ),
                found=", ".join(f"{n}: {list(a.shape)}" for n, a in sorted(feeds.items())),
                remedy="use the shapes of one signature, or build with this shape in the profile",
            )
        return found

    def _run(self, runner: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import numpy as np

        try:
            found = runner(**{name: np.ascontiguousarray(a) for name, a in feeds.items()})
        except (ValueError, RuntimeError) as error:
            raise ContractError(
                f"{self._path}: LiteRT could not run the model",
                expected="; ".join(str(spec) for spec in self._contract.inputs),
                found=str(error).strip()[:400],
                remedy="pass the dtypes and shapes of one signature",
            ) from error
        return {spec.name: found[spec.name] for spec in self._contract.outputs}

    def _check_known(self, names: Sequence[str] | None, known: list[str]) -> None:
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
            raise ContractError(
                f"probe of {', '.join(unknown)}",
                expected="names of values that an operation of the graph computes",
                found="unknown names",
                remedy=f"did you mean {', '.join(near)}?" if near else "list the values first",
            )


def _shapes_of(signature: tflite.Signature) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, tensor.shape) for name, tensor in signature.inputs.items()))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Keep "INFO: Created TensorFlow Lite XNNPACK delegate" from the terminal.

    LiteRT writes it past Python and has no setting for it. Every other line is passed on.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        try:
            os.dup2(held.fileno(), 2)
            yield
        finally:
            os.dup2(terminal, 2)
            held.seek(0)
            kept = [line for line in held if not line.startswith(b"INFO: ")]
            os.write(terminal, b"".join(kept))
            os.close(terminal)
