"""What is asked of a component's recording: the options that every capturing stage has."""

from __future__ import annotations

from dataclasses import dataclass

from diffoundry.types import Precision

DEFAULT_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
NamedShape = tuple[tuple[str, int], ...]
"""A shape as sorted (axis, value) pairs, which may name axes that a component does not have."""


@dataclass(frozen=True)
class Asked:
    """split: whose prompts these are. Floors and swaps are recorded for "evaluation" alone, which
    is the split that checks read. calls_per_component: of how many trajectories the calls are
    kept; latents and pictures are kept of all. max_calls: calls kept of one component at most
    (every check of an engine replays them all). shapes, untraced_shapes: further shapes to call
    the reference at. probe: of a large model, the shape of the one call that floors and exchanged
    inputs are measured on; without it they are measured on the trajectories' calls, floors at
    every shape. precisions: whose floors. left_out: declared shapes that are too much work to
    visit.
    """

    split: str = "evaluation"
    calls_per_component: int = 2
    max_calls: int = 16
    shapes: tuple[NamedShape, ...] = ()
    untraced_shapes: tuple[NamedShape, ...] = ()
    probe: NamedShape = ()
    precisions: tuple[Precision, ...] = DEFAULT_PRECISIONS
    left_out: tuple[NamedShape, ...] = ()
