"""What a build of a large model visits: every call of it takes seconds, so they are counted.

A model is large where its parameters times the pixels of the usual picture pass LARGE; Stable
Diffusion 1.5 at 512×512 is 280 times above, the shipped model 50 times below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffoundry.formats.smaller_calls import LARGE
from diffoundry.formats.torch_module import read_headers
from diffoundry.models.pipeline import COMPONENTS, PipelineSource
from diffoundry.planning.graph import Plan
from diffoundry.planning.shapes import axes_of, declared_shapes, promised, untraced_shape
from diffoundry.types import Axis

PAIRS = {"evaluation": None, "calibration": 2, "tuning": 1}
"""Split -> trajectories of a large model at most."""
CALLS = {"evaluation": 2, "calibration": 8, "tuning": 4}
"""Split -> calls of one component kept of a large model at most. Checks replay the evaluation's, a
trajectory's first and last."""


@dataclass(frozen=True)
class Visits:
    """The shapes at which a build calls the original and the engines.

    `shapes` come besides the trajectories' own, `untraced` is one that no export traces. `probe`
    is where floors and exchanged inputs are measured: None for a model that is not large, whose
    trajectories' calls serve. `left_out`: declared, but more work than the usual shape.
    """

    shapes: tuple[dict[str, int], ...]
    untraced: dict[str, int] | None
    probe: dict[str, int] | None = None
    left_out: tuple[dict[str, int], ...] = ()


def parameters_of(source: PipelineSource, component: str) -> int:
    """Parameters in a component's folder, from the files' headers (both halves of a VAE)."""
    headers = read_headers(source.components[component].folder)
    return sum(math.prod(header.shape) for header in headers.values())


def is_large(source: PipelineSource, axes: Sequence[Axis]) -> bool:
    """Whether calls of this model at its usual shape are counted; a preview decoder is no part of
    the model."""
    folders = {source.components[name].folder: name for name in COMPONENTS}
    parameters = sum(parameters_of(source, name) for name in folders.values())
    return parameters * work({axis.name: axis.opt for axis in axes}) > LARGE


def work(shape: Mapping[str, int]) -> int:
    """Pixels of all pictures of a batch: what a call's time grows with, at the least."""
    return math.prod(shape.values())


def visits(plan: Plan) -> Visits:
    """The shapes that the one recording of a profile needs.

    Every variant's own, so that all variants share the capture. The corners of the axes and the
    untraced shape are only asked for where a variant is dynamic. Of a large model, unless the
    profile says `check.shapes = "all"`, only what is no more work than the usual shape, which is
    left to the trajectories.
    """
    axes, declared = axes_of(plan), list[dict[str, int]]()
    for request in plan.profile.variants:
        declared += [shape for shape in promised(plan, request) if shape not in declared]
    dynamic = any(request.shapes == "dynamic" for request in plan.profile.variants)
    if not is_bounded(plan):
        listed = [shape for shape in declared if shape not in declared_shapes(axes, "dynamic")]
        return Visits(tuple(declared), untraced_shape(axes, listed) if dynamic else None)
    usual = {axis.name: axis.opt for axis in axes}
    light = [shape for shape in declared if work(shape) <= work(usual)]
    return Visits(
        tuple(shape for shape in light if shape != usual),
        _light_untraced(axes) if dynamic else None,
        min((shape for shape in light if _common(plan, shape)), key=work),
        tuple(shape for shape in declared if shape not in light),
    )


def is_bounded(plan: Plan) -> bool:
    """Whether this build counts its calls."""
    return plan.profile.check.shapes == "auto" and is_large(plan.source, axes_of(plan))


def _common(plan: Plan, shape: dict[str, int]) -> bool:
    """Whether every variant has this shape (the usual one always is)."""
    return all(
        request.shapes == "dynamic" or shape in promised(plan, request)
        for request in plan.profile.variants
    )


def _light_untraced(axes: Sequence[Axis]) -> dict[str, int] | None:
    """The smallest shape but for its batch and its height, which are one step larger."""
    shape = {axis.name: axis.min for axis in axes}
    for axis in axes:
        if axis.name in ("batch", "height") and axis.min + axis.multiple_of <= axis.max:
            shape[axis.name] += axis.multiple_of
    return None if shape in declared_shapes(axes, "dynamic") else shape
