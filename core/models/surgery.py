"""surgery.json: an ordered list of typed operations that the loader replays on a network.

    {"schema": "diffoundry.surgery/1", "operations": [{"operation": "prune_heads", ...}]}

An operation is a pydantic model with a literal `operation` field; it is known once it stands in
OPERATIONS. One that changes sizes does so in `resize`, before the weights are read: the files hold
the smaller tensors. One that changes values does so in `apply`, after.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffoundry.errors import ModelError

if TYPE_CHECKING:
    import torch

SCHEMA = "diffoundry.surgery/1"


class Operation(BaseModel):
    """One change of a network, in place."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    operation: str

    def resize(self, network: torch.nn.Module) -> None:
        """Change sizes of a network whose parameters are on the meta device."""

    def apply(self, network: torch.nn.Module, folder: Path) -> None:
        """Change values of a network whose weights are read; `folder` holds what that needs."""


class Prune(Operation):
    """Units that were cut out of one block: of `units` there, those in `kept` are left."""

    operation: Literal["prune_channels", "prune_feed_forward", "prune_heads"]
    module: str
    units: int = Field(ge=2)
    kept: tuple[int, ...]

    def resize(self, network: torch.nn.Module) -> None:
        """Raises ModelError where the network has no such block, or one of another size."""
        from diffoundry.models.pruning import cut, find_sites

        kind = self.operation.removeprefix("prune_")
        for site in find_sites(network):
            if (site.kind, site.module, site.units) == (kind, self.module, self.units):
                cut(network, site, self.kept)
                return
        raise ModelError(
            f"surgery: {self.operation}",
            expected=f"a block {self.module!r} with {self.units} units",
            found="none such in the network that config.json describes",
            remedy="config.json and surgery.json come from different models",
        )


class SplitConvolution(Operation):
    """A convolution in two: of its first `channels` input channels, and of the rest."""

    operation: Literal["split_convolution"]
    module: str
    channels: int = Field(ge=1)

    def resize(self, network: torch.nn.Module) -> None:
        """Raises ModelError where the network has no such convolution."""
        from diffoundry.models.splits import split_convolution

        split_convolution(network, self.module, self.channels)


class SplitFirstToken(Operation):
    """A linear layer on tokens in two: the first token's, and the others'."""

    operation: Literal["split_first_token"]
    module: str

    def resize(self, network: torch.nn.Module) -> None:
        """Raises ModelError where the network has no such linear layer."""
        from diffoundry.models.splits import split_first_token

        split_first_token(network, self.module)


class SplitDoubling(Operation):
    """A convolution behind a doubling of the plane in four: one for each pixel that one becomes."""

    operation: Literal["split_doubling"]
    module: str

    def resize(self, network: torch.nn.Module) -> None:
        """Raises ModelError where the network has no such convolution."""
        from diffoundry.models.splits import split_doubling

        split_doubling(network, self.module)


OPERATIONS: dict[str, Any] = {
    **dict.fromkeys(("prune_channels", "prune_feed_forward", "prune_heads"), Prune),
    "split_convolution": SplitConvolution,
    "split_doubling": SplitDoubling,
    "split_first_token": SplitFirstToken,
}
"""Name -> the pydantic model class of the operation."""


def write_surgery(folder: Path, operations: Sequence[Operation]) -> None:
    """Write `operations`, in order, into `folder`'s surgery.json."""
    from diffoundry.formats.canonical import canonical_json
    from diffoundry.formats.torch_module import SURGERY

    entries = [one.model_dump(mode="json") for one in operations]
    (folder / SURGERY).write_bytes(canonical_json({"schema": SCHEMA, "operations": entries}))


def read_surgery(folder: Path) -> tuple[Operation, ...]:
    """The operations in `folder`'s surgery.json, in order; none when there is no such file.

    Raises ModelError for a file of another format, an unknown operation, or wrong fields.
    """
    from pydantic import ValidationError

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
