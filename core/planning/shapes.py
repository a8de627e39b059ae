"""Which shapes a variant promises, and which of them a check must visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffoundry.planning.graph import Plan
from diffoundry.profiles.profile import VariantRequest
from diffoundry.types import Axis, ShapePolicy

NamedShape = tuple[tuple[str, int], ...]


def declared_shapes(axes: Sequence[Axis], policy: str) -> tuple[dict[str, int], ...]:
    """The shapes a variant promises that a check must visit: opt, and for dynamic min and max."""
    corners = ["opt"] if policy == "fixed" else ["opt", "min", "max"]
    shapes: list[dict[str, int]] = []
    for corner in corners:
        shape = {axis.name: int(getattr(axis, corner)) for axis in axes}
        if shape not in shapes:
            shapes.append(shape)
    return tuple(shapes)


def untraced_shape(axes: Sequence[Axis]) -> dict[str, int] | None:
    """A legal shape that no export traces and no corner visits, not square where that can be.

    None where the axes allow nothing else.
    """
    choices = []
    for position, axis in enumerate(axes):
        first = -(-axis.min // axis.multiple_of) * axis.multiple_of
        values = list(range(first, axis.max + 1, axis.multiple_of))
        inner = [v for v in values if v not in (axis.min, axis.opt, axis.max)] or values
        choices.append((axis.name, inner[min(position, len(inner) - 1)]))
    shape = dict(choices)
    if shape in declared_shapes(axes, "dynamic"):
        last = axes[-1]
        shape[last.name] = last.min if shape[last.name] != last.min else last.max
    return None if shape in declared_shapes(axes, "dynamic") else shape


def shape_policy_of(plan: Plan, request: VariantRequest) -> ShapePolicy:
    """The shape policy a variant asks for, over the plan's axes."""
    if request.shapes == "dynamic":
        return ShapePolicy("dynamic")
    shapes = declared_shapes(_axes_of(plan), request.shapes)
    return ShapePolicy("fixed", tuple(named(shape) for shape in shapes))


def _axes_of(plan: Plan) -> tuple[Axis, ...]:
    """Every axis of the build, each once."""
    axes = {axis.name: axis for contract in plan.contracts.values() for axis in contract.axes}
    return tuple(axes[name] for name in ("batch", "height", "width") if name in axes)


def named(shape: Mapping[str, int]) -> NamedShape:
    """A shape as sorted (axis, value) pairs, which can be an option of a stage."""
    return tuple(sorted(shape.items()))
