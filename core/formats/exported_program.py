"""The `exported_program` format: torch.export's program.pt2, weights.safetensors, program.json.

The .pt2 holds the program with weights of no size, as torch's own format copies every weight
when it is written and again when it is read; the weights lie beside it and are mapped.

A .pt2 is a disposable cache and never lineage: its bytes differ between two identical exports
(serialization id, absolute paths in stack traces). program.json holds what the program *is*:
digests of the canonical graph text, the signature and every weight; the artifact's digest is made
from it. program.seal holds the digest of the .pt2, so that a damaged file is noticed; the store
knows that of the weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical, safetensors_file
from diffoundry.types import Array

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

PROGRAM_FILE = "program.pt2"
WEIGHTS_FILE = "weights.safetensors"
FACTS_FILE = "program.json"
SEAL_FILE = "program.seal"
_REMEDY = "delete it; the build makes it again"

# One slot: the next stage in the same worker process does not read the file again. Keyed by the
# program's own digest, since the store moves the folder between two stages.
_last_saved: tuple[str, Any] | None = None


def save(program: ExportedProgram, folder: Path) -> None:
    """Write `program` into `folder`, and keep it in memory for the next `load`."""
    global _last_saved
    import torch

    facts = canonical.pretty_json(describe(program))
    weights = dict(program.state_dict)
    safetensors_file.write_stream(folder / WEIGHTS_FILE, _as_arrays(weights))
    with warnings.catch_warnings():
        # torch's own pytree code warns about itself.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "No complete tensor found")  # as is meant
        try:
            _replace_weights(program, {name: _sizeless(one) for name, one in weights.items()})
            torch.export.save(program, folder / PROGRAM_FILE)
        finally:
            _replace_weights(program, weights)
    (folder / FACTS_FILE).write_text(facts)
    (folder / SEAL_FILE).write_text(canonical.sha256_file(folder / PROGRAM_FILE) + "\n")
    _last_saved = (canonical.sha256_bytes(facts.encode()), program)


def _as_arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: value.detach().cpu().numpy() for name, value in weights.items()}


def _sizeless(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype that repeats one zero."""
    import torch

    zero = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
    return torch.nn.Parameter(zero, False) if isinstance(weight, torch.nn.Parameter) else zero


def _replace_weights(program: ExportedProgram, weights: Mapping[str, torch.Tensor]) -> None:
    program._state_dict = dict(weights)


def _mapped_weights(folder: Path, program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The program's weights, mapped from their file, in the program's order.

    Raises ArtifactError where names or shapes are not the program's.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for name, sizeless in program.state_dict.items():
                value = file.get_tensor(name)
                if value.shape != sizeless.shape or value.dtype != sizeless.dtype:
                    raise _foreign(folder, f"{name}: {value.dtype}{list(value.shape)}")
                is_parameter = isinstance(sizeless, torch.nn.Parameter)
                found[name] = torch.nn.Parameter(value, False) if is_parameter else value
    except (SafetensorError, OSError) as error:
        raise _foreign(folder, str(error)) from error
    return found


def _foreign(folder: Path, found: str) -> ArtifactError:
    return ArtifactError(
        str(folder / WEIGHTS_FILE), expected="the program's weights", found=found, remedy=_REMEDY
    )


def load(folder: Path) -> ExportedProgram:
    """The program in `folder`: from memory where it was saved last by this process.

    Raises ArtifactError for a damaged folder.
    """
    key = digest(folder)
    if _last_saved is not None and _last_saved[0] == key:
        return _last_saved[1]
    import torch

    validate(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(folder / PROGRAM_FILE)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ArtifactError(
            str(folder / PROGRAM_FILE),
            expected="a program of this torch version",
            found=str(error)[:300],
            remedy=_REMEDY,
        ) from error
    _drop_expression_ranges(program)
    _replace_weights(program, _mapped_weights(folder, program))
    return program


def forget() -> None:
    """Drop the program kept in memory."""
    global _last_saved
    _last_saved = None


def validate(folder: Path) -> None:
    """Check that program.pt2 is the file that was written. Raises ArtifactError."""
    digest(folder)
    file = folder / PROGRAM_FILE
    if not all((folder / name).is_file() for name in (PROGRAM_FILE, SEAL_FILE, WEIGHTS_FILE)):
        raise ArtifactError(str(file), expected="a program and its seal", found="a file is missing",
                            remedy=_REMEDY)  # fmt: skip
    expected, found = (folder / SEAL_FILE).read_text().strip(), canonical.sha256_file(file)
    if expected != found:
        raise ArtifactError(str(file), expected=expected, found=found, remedy=_REMEDY)


def canonicalise(folder: Path) -> None:
    """Nothing to do: the digest is not made from program.pt2's bytes."""


def digest(folder: Path) -> str:
    """Digest of what the program is (graph, signature, weights). Raises ArtifactError."""
    file = folder / FACTS_FILE
    try:
        data = file.read_bytes()
        facts = json.loads(data)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            str(file), expected="an exported program's facts", found=str(error), remedy=_REMEDY
        ) from error
    if not isinstance(facts, dict) or "graph" not in facts:
        raise ArtifactError(str(file), expected="an exported program's facts", found="other JSON")
    return canonical.sha256_bytes(data)


def size_bytes(folder: Path) -> int:
    """Size of all files of the folder."""
    return canonical.tree_size_bytes(folder)


def describe(program: ExportedProgram) -> dict[str, Any]:
    """What the program is, the same in every process: digests of graph, signature and weights."""
    tensors = {**program.state_dict, **program.constants}
    return {
        "schema": "diffoundry.exported_program/1.0",
        "graph": canonical.sha256_bytes(graph_text(program).encode()),
        "signature": canonical.sha256_bytes(str(program.graph_signature).encode()),
        "weights": {name: _tensor_digest(tensors[name]) for name in sorted(tensors)},
    }


def graph_text(program: ExportedProgram) -> str:
    """Every node with its target, arguments and shape, and the ranges of the named sizes."""
    import torch

    lines = []
    for name, module in program.graph_module.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            lines.append(f"graph {name}")
            lines += [
                f"{node.name} = {node.op} {node.target} {node.args} {node.kwargs}"
                f" : {_shape_text(node.meta.get('val'))}"
                for node in module.graph.nodes
            ]
    lines += sorted(f"{name}: {size}" for name, size in program.range_constraints.items())
    return "\n".join(lines)


def _shape_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shape_text(item) for item in value) + "]"
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return str(value)


def _tensor_digest(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return canonical.sha256_bytes(repr(value).encode())
    data = value.detach().cpu().contiguous()
    head = f"{data.dtype} {list(data.shape)}\n".encode()
    raw = data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b""
    sha = hashlib.sha256(head)
    sha.update(raw)
    return "sha256:" + sha.hexdigest()


def _drop_expression_ranges(program: ExportedProgram) -> None:
    """Undo what torch 2.13's loader does to programs with sizes like 2*h.

    It enters the expression as if it were a symbol, and run_decompositions then fails with
    "expected sympy.Symbol".
    """
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            ranges = mode.shape_env.var_to_range
            for size in [size for size in ranges if not size.is_Symbol]:
                del ranges[size]
            return
