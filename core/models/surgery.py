"""surgery.json: an ordered list of typed operations that the loader replays on a network.

    {"schema": "diffoundry.surgery/1", "operations": [{"operation": "fuse_lora", ...}]}

An operation is a pydantic model with a literal `operation` field and an
`apply(network, folder)` method; it is known once it stands in OPERATIONS. There is none yet.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from diffoundry.errors import ModelError

if TYPE_CHECKING:
    import torch

SCHEMA = "diffoundry.surgery/1"


class Operation(Protocol):
    """One change of a loaded network, in place."""

    operation: str

    def apply(self, network: torch.nn.Module, folder: Path) -> None: ...


OPERATIONS: dict[str, Any] = {}
"""Name -> the pydantic model class of the operation."""


def read_surgery(folder: Path) -> tuple[Operation, ...]:
    """The operations in `folder`'s surgery.json, in order; none when there is no such file.

    Raises ModelError for a file of another format, an unknown operation, or wrong fields.
    """
    from pydantic import BaseModel, ConfigDict, ValidationError

    from diffoundry.formats.torch_module import SURGERY, model_file, read_json

    class _Surgery(BaseModel):
        model_config = ConfigDict(extra="forbid")
        schema_: Literal["diffoundry.surgery/1"]
        operations: list[dict[str, Any]]

    if not (folder / SURGERY).exists():
        return ()
    path = model_file(folder, SURGERY)
    data = read_json(path)
    try:
        surgery = _Surgery.model_validate(
            {("schema_" if k == "schema" else k): v for k, v in data.items()}
        )
        return tuple(_operation(path, entry) for entry in surgery.operations)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ModelError(
            str(path), expected=f"{SCHEMA}: operations with their fields", found=problems
        ) from error


def _operation(path: Path, entry: dict[str, Any]) -> Operation:
    name = str(entry.get("operation"))
    if name not in OPERATIONS:
        near = difflib.get_close_matches(name, OPERATIONS, n=1)
        known = ", ".join(sorted(OPERATIONS)) or "none in this version"
        raise ModelError(
            str(path),
            expected=f"operations that this version knows ({known})",
            found=f"the operation {name!r}",
            remedy=f"did you mean {near[0]!r}?" if near else "use a newer Diffoundry",
        )
    operation: Operation = OPERATIONS[name].model_validate(entry)
    return operation
