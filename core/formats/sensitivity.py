"""The sensitivity kind: what each layer of a plan costs when it alone is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffoundry.formats import canonical
from diffoundry.formats.documents import reading

KIND = "sensitivity"
FILE = "sensitivity.json"
SCHEMA = "diffoundry.sensitivity/1.0"


@dataclass(frozen=True)
class Row:
    """One layer, quantized alone as its plan says.

    `sqnr_db`: of the component's outputs over the tuning calls. `ssim`: structural similarity of
    the outputs taken as pictures, the worst call's (1 where they are no pictures): what SQNR alone
    does not see (MixDQ, arXiv 2405.17873, section 4.3). `cost`: multiply-adds, or seconds, of the
    layer: what it costs to leave it in float.
    """

    module: str
    scheme: str
    sqnr_db: float
    ssim: float
    cost: float


@dataclass(frozen=True)
class Sensitivity:
    """All rows in the plan's order; none where the budget held and nothing was measured.

    `method`: "alone", each row is of the component's outputs as `Row` says; "own_output", a row's
    `sqnr_db` is that of the layer's own output (all from one pass), and `ssim` 1.

    `whole_db`: SQNR of the plan as it came, `reached_db`: as it left. `reverted`: layers whose
    activations went back to float, in the order of the repair.
    """

    component: str
    rows: tuple[Row, ...]
    whole_db: float
    reached_db: float
    budget_db: float | None = None
    reverted: tuple[str, ...] = ()
    method: Literal["alone", "own_output"] = "alone"
    settings: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, table: Sensitivity) -> None:
    """Write the table into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(canonical.pretty_json({"schema": SCHEMA, "table": table}))


def load(folder: Path) -> Sensitivity:
    """The table. Raises ArtifactError where it is damaged."""
    path = canonical.inside(folder, FILE)
    with reading("sensitivity table", path, SCHEMA) as document:
        return canonical.parse(Sensitivity, document["table"])


def validate(folder: Path) -> None:
    """Raises ArtifactError where the table is damaged."""
    load(folder)


def digest(folder: Path) -> str:
    """Digest of the table (it is written canonically)."""
    return canonical.tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Bytes of the table."""
    return canonical.tree_size_bytes(folder)
