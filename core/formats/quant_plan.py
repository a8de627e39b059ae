"""The quant_plan kind: which layers of a component become INT8, how, and why.

A folder with `plan.json` (one entry per layer, keyed by the layer's qualified name in the
component's module) and `plan.safetensors` (per layer `<module>.weight_scale` float32 [out channels]
and `<module>.bias` float32 [out channels] where it was corrected). Estimators make plans; appliers
write them into each format; the simulator computes what they mean.

Weights are symmetric INT8 per output channel (axis 0; per row for an embedding):
real = scale × stored, stored in -127..127. A static activation is on the grid that `grid_of` makes
of its range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffoundry.errors import ArtifactError
from diffoundry.formats import canonical
from diffoundry.formats.documents import reading
from diffoundry.types import Array

KIND = "quant_plan"
WHAT = "quantization plan"
SCHEMA = "diffoundry.quant_plan/1.0"
PLAN_FILE = "plan.json"
TENSORS_FILE = "plan.safetensors"

Scheme = Literal["static", "dynamic", "weight_only", "float"]
WEIGHT_STEPS = 127


@dataclass(frozen=True)
class Range:
    """Smallest and largest real value that a grid holds."""

    low: float
    high: float


@dataclass(frozen=True)
class Grid:
    """real = scale × (stored − zero_point). Unsigned: stored in 0..255; signed: −128 less."""

    scale: float
    zero_point: int

    @property
    def signed_zero_point(self) -> int:
        """The zero point where stored values are signed (−128..127)."""
        return self.zero_point - 128


@dataclass(frozen=True)
class LayerPlan:
    """One layer. `scheme`:

    static: INT8 weight, and the input on the grid of the range `activation`.
    dynamic: INT8 weight, and the input on a grid of its own at every call (per tensor).
    weight_only: INT8 weight, computed in float.
    float: nothing is quantized.

    `output` is the range of the layer's output, where that is put on a grid too. `symmetric`: the
    grids have their zero in the middle (what TensorRT takes). `why` is in words.
    """

    module: str
    kind: Literal["conv", "linear", "embedding"]
    scheme: Scheme
    why: str = "default"
    activation: Range | None = None
    output: Range | None = None
    symmetric: bool = False

    @property
    def integer_kernel(self) -> bool:
        """Whether a runtime is meant to multiply integers here."""
        return self.scheme in ("static", "dynamic")

    @property
    def integer_weight(self) -> bool:
        return self.scheme != "float"


@dataclass(frozen=True)
class QuantPlan:
    """All layers of one component in the order of its modules. `settings` are the estimator's."""

    component: str
    estimator: str
    settings: Mapping[str, Any]
    layers: tuple[LayerPlan, ...]
    tensors: Mapping[str, Array] = field(default_factory=dict, repr=False)

    @cached_property
    def by_module(self) -> Mapping[str, LayerPlan]:
        return {layer.module: layer for layer in self.layers}

    def weight_scale(self, module: str) -> Array:
        """float32 [out channels]."""
        return self.tensors[f"{module}.weight_scale"]

    def bias(self, module: str) -> Array | None:
        """The corrected bias, float32 [out channels], or None where the layer keeps its own."""
        return self.tensors.get(f"{module}.bias")


def grid_of(span: Range, symmetric: bool = False) -> Grid:
    """The 8-bit grid that covers `span` and holds 0 exactly; scale rounded to float32.

    Symmetric: zero point 128 (0 when signed), stored values −127..127 when signed.
    Raises ArtifactError for a range that is not finite.
    """
    import numpy as np

    low, high = min(span.low, 0.0), max(span.high, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ArtifactError("quantization plan", expected="finite ranges", found=f"{low}..{high}")
    if symmetric:
        scale = float(np.float32(max(-low, high) / WEIGHT_STEPS)) or 1.0
        return Grid(scale, 128)
    scale = float(np.float32((high - low) / 255)) or 1.0
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, 255)))


def integer_weight(weight: Array, scale: Array) -> Array:
    """`weight` [out, ...] float32 on its grid: int8 in −127..127; scale [out]."""
    import numpy as np

    steps = weight / scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return np.clip(np.rint(steps), -WEIGHT_STEPS, WEIGHT_STEPS).astype(np.int8)


def missing_layers(plan: QuantPlan, names: set[str] | frozenset[str]) -> list[str]:
    """Layers of the plan that are not among `names`, in the plan's order."""
    return [layer.module for layer in plan.layers if layer.module not in names]


def refuse_missing(plan: QuantPlan, names: set[str] | frozenset[str], where: str) -> None:
    """Raise ArtifactError that names every layer of the plan which is not among `names`."""
    missing = missing_layers(plan, names)
    if missing:
        raise ArtifactError(
            f"{where}: quantization plan of {plan.component}",
            expected=f"layers that are there ({len(names)} known)",
            found=f"{len(missing)} that are not: {', '.join(missing)}",
            remedy="the plan belongs to another model: make it anew from this one",
        )


def save(folder: Path, plan: QuantPlan) -> None:
    """Write the plan into `folder` (made if absent); equal plans give equal bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": SCHEMA,
        "component": plan.component,
        "estimator": plan.estimator,
        "settings": dict(plan.settings),
        "layers": plan.layers,
    }
    (folder / PLAN_FILE).write_text(canonical.pretty_json(document))
    arrays = {name: np.ascontiguousarray(plan.tensors[name]) for name in sorted(plan.tensors)}
    save_file(arrays, folder / TENSORS_FILE)


def load(folder: Path) -> QuantPlan:
    """The plan. Raises ArtifactError where it is damaged or incomplete."""
    from safetensors.numpy import load_file

    with reading(WHAT, canonical.inside(folder, PLAN_FILE), SCHEMA) as document:
        tensors = load_file(canonical.inside(folder, TENSORS_FILE))
        del document["schema"]
        plan = canonical.parse(QuantPlan, {**document, "tensors": {}})
        plan = dataclasses.replace(plan, tensors=tensors)
        problems = _problems(plan)
        if problems:
            raise ValueError("; ".join(problems))
        return plan


def read_layers(path: Path) -> tuple[LayerPlan, ...]:
    """The layers of a plan.json alone, as a bundle carries it. Raises ArtifactError."""
    with reading(WHAT, path, SCHEMA) as document:
        return canonical.parse(tuple[LayerPlan, ...], document["layers"])


def _problems(plan: QuantPlan) -> list[str]:
    import numpy as np

    problems = []
    for layer in plan.layers:
        if layer.integer_weight:
            scale = plan.tensors.get(f"{layer.module}.weight_scale")
            if scale is None or not np.isfinite(scale).all() or not (scale > 0).all():
                problems.append(f"{layer.module}: no weight scale, or one that is not positive")
        if layer.scheme == "static" and layer.activation is None:
            problems.append(f"{layer.module}: static, but no activation range")
    return problems


def validate(folder: Path) -> None:
    """Raises ArtifactError where the plan is damaged."""
    load(folder)


def digest(folder: Path) -> str:
    """Digest of the two files (they are written canonically)."""
    return canonical.tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Bytes of the plan."""
    return canonical.tree_size_bytes(folder)
