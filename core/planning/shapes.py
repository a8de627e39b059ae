"""Which shapes a variant promises, and which of them a check must visit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diffoundry.errors import ProfileError
from diffoundry.planning.graph import Plan
from diffoundry.profiles.profile import ShapeRequest, VariantRequest
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


def untraced_shape(
    axes: Sequence[Axis], taken: Sequence[Mapping[str, int]] = ()
) -> dict[str, int] | None:
    """A legal shape that no export traces and no corner visits, not square where that can be.

    It keeps off the values of the shapes in `taken` where it can: a component that has but one
    of the axes must find a value there that is new to it. None where the axes allow nothing else.
    """
    visited = [*declared_shapes(axes, "dynamic"), *taken]
    choices = []
    for position, axis in enumerate(axes):
        first = -(-axis.min // axis.multiple_of) * axis.multiple_of
        values = list(range(first, axis.max + 1, axis.multiple_of))
        inner = [v for v in values if v not in (axis.min, axis.opt, axis.max)] or values
        inner = [v for v in inner if all(one[axis.name] != v for one in taken)] or inner
        choices.append((axis.name, inner[min(position, len(inner) - 1)]))
    shape = dict(choices)
    if shape in visited:
        last = axes[-1]
        shape[last.name] = last.min if shape[last.name] != last.min else last.max
    return None if shape in visited else shape


def shape_policy_of(plan: Plan, request: VariantRequest) -> ShapePolicy:
    """The shape policy a variant asks for, over the plan's axes.

    Raises ProfileError that lists every shape of a list that the axes do not allow.
    """
    if request.shapes == "dynamic":
        return ShapePolicy("dynamic")
    shapes = promised(plan, request)
    return ShapePolicy(request.shape_kind, tuple(named(shape) for shape in shapes))


def promised(plan: Plan, request: VariantRequest) -> tuple[dict[str, int], ...]:
    """The shapes of a variant that a check must visit."""
    if isinstance(request.shapes, str):
        return declared_shapes(axes_of(plan), request.shapes)
    return _enumerated(plan, request.shapes, f"profile {plan.profile.name}: variant {request.name}")


def _enumerated(
    plan: Plan, requests: Sequence[ShapeRequest], where: str
) -> tuple[dict[str, int], ...]:
    """The listed shapes, each axis filled in. Raises ProfileError with all that is wrong."""
    axes = axes_of(plan)
    shapes: list[dict[str, int]] = []
    problems: list[str] = []
    for index, request in enumerate(requests):
        shape = {axis.name: _size(plan, axis, request) for axis in axes}
        problems += [
            f"shapes.{index}: {problem}"
            for axis in axes
            if (problem := axis.problem_with(shape[axis.name])) is not None
        ]
        if shape in shapes:
            problems.append(f"shapes.{index}: the same shape as shapes.{shapes.index(shape)}")
        shapes.append(shape)
    opt = {axis.name: axis.opt for axis in axes}
    if opt not in shapes:
        problems.append(f"without the usual shape, where pictures are checked: {_say(opt)}")
    if problems:
        raise ProfileError(
            f"{where}, shapes",
            expected="different shapes that the axes allow: "
            + ", ".join(f"{a.name} {a.min}..{a.max} by {a.multiple_of}" for a in axes),
            found="; ".join(problems),
            remedy="mend the list, or widen the axes in the profile",
        )
    return tuple(shapes)


def _size(plan: Plan, axis: Axis, request: ShapeRequest) -> int:
    """The size asked for on one axis, rounded to a legal one where it counts native sizes."""
    wanted = request.sizes().get(axis.name)
    if wanted is None:
        return axis.opt
    if request.unit == "native" and axis.name != "batch":
        geometry = plan.source.geometry
        native = {"height": geometry.native_height_pixels, "width": geometry.native_width_pixels}
        steps = math.floor(wanted * native[axis.name] / axis.multiple_of + 0.5)
        return max(1, steps) * axis.multiple_of
    return int(wanted)


def _say(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in shape.items())


def axes_of(plan: Plan) -> tuple[Axis, ...]:
    """Every axis of the build, each once."""
    axes = {axis.name: axis for contract in plan.contracts.values() for axis in contract.axes}
    return tuple(axes[name] for name in ("batch", "height", "width") if name in axes)


def named(shape: Mapping[str, int]) -> NamedShape:
    """A shape as sorted (axis, value) pairs, which can be an option of a stage."""
    return tuple(sorted(shape.items()))
