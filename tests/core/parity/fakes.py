"""A small numpy "network", its recording, and sessions that misbehave on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffoundry.errors import ContractError
from diffoundry.formats.recording import (
    Call,
    ComponentRecording,
    Effect,
    Floor,
    ShapeCall,
    Swap,
)
from diffoundry.types import Array, Axis, AxisRef, Contract, ShapePolicy, TensorSpec

LATENT = (AxisRef("batch"), 2, AxisRef("height", 4), AxisRef("width", 4))
CONTRACT = Contract(
    "unet",
    inputs=(
        TensorSpec("sample", "float32", LATENT),
        TensorSpec("timestep", "float32", (AxisRef("batch"),)),
        TensorSpec("timestep_cond", "float32", (AxisRef("batch"), 3)),
    ),
    outputs=(TensorSpec("model_output", "float32", LATENT),),
    axes=(Axis("batch", 1, 1, 2), Axis("height", 16, 24, 40, 8), Axis("width", 16, 24, 40, 8)),
)
USUAL = {"batch": 1, "height": 24, "width": 24}
SMALLEST = {"batch": 1, "height": 16, "width": 16}
LARGEST = {"batch": 2, "height": 40, "width": 40}
UNTRACED = {"batch": 1, "height": 32, "width": 16}
FLOORS = {
    "fp32": {"model_output": Floor(2e-7, 5e-8, 8e-8, 140.0)},
    "fp16": {"model_output": Floor(2e-3, 5e-4, 8e-4, 60.0)},
}

Hook = Callable[[Array], Array]


def nodes_of(
    feeds: Mapping[str, Array], hooks: Mapping[str, Hook], dtype: str = "float32"
) -> dict[str, Array]:
    """Every value of the network by node name, in order; a hook replaces its node's value."""
    values: dict[str, Array] = {}

    def node(name: str, value: Array) -> Array:
        changed = hooks[name](value) if name in hooks else value
        # Rounding each value is what a runtime of that precision does.
        values[name] = np.asarray(changed).astype(dtype).astype(np.float32)
        return values[name]

    sample = feeds["sample"]
    time = node("time", np.sin(feeds["timestep"] / 100)[:, None, None, None] * 0.5)
    weights = np.array([[0.5, -0.3], [0.2, 0.4], [-0.6, 0.1]], np.float32)
    guidance = node("guidance", (feeds["timestep_cond"] @ weights)[:, :, None, None])
    hidden = node("hidden", sample * (1 + time) + guidance)
    active = node("active", hidden / (1 + np.exp(-hidden)))
    node("model_output", active[:, ::-1] * 0.7 + sample * 0.2)
    return values


def original(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The reference's outputs."""
    return {"model_output": nodes_of(feeds, {})["model_output"]}


@dataclass
class FakeSession:
    """The network as an engine. `hooks` spoil nodes, `spoil` spoils the outputs as a whole."""

    hooks: Mapping[str, Hook] = field(default_factory=dict)
    spoil: Callable[[dict[str, Array], Mapping[str, Array]], dict[str, Array]] | None = None
    policy: ShapePolicy = field(default_factory=ShapePolicy)
    dtype: str = "float32"
    compute: Any = "fp32"
    can_probe: bool = True
    calls: int = 0
    closed: bool = False

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls += 1
        shape = CONTRACT.check_feeds(feeds)
        if not self.policy.allows(shape):
            raise ContractError("unet: fixed shapes", expected="24", found=str(shape))
        outputs = {"model_output": nodes_of(feeds, self.hooks, self.dtype)["model_output"]}
        return self.spoil(outputs, feeds) if self.spoil else outputs

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        if not self.can_probe:
            raise ContractError("this format can't be probed")
        return nodes_of(feeds, self.hooks, self.dtype)

    def precision_used(self) -> dict[str, Any]:
        if isinstance(self.compute, Mapping):
            return dict(self.compute)
        return {"compute": self.compute} if self.compute else {}

    def close(self) -> None:
        self.closed = True


def make_feeds(shape: Mapping[str, int], seed: int) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    feeds = {
        spec.name: draw.standard_normal(spec.shape(shape)).astype(np.float32)
        for spec in CONTRACT.inputs
    }
    feeds["timestep"] = np.full(shape["batch"], 100.0 + 50 * seed, np.float32)
    return feeds


def make_call(shape: Mapping[str, int], seed: int) -> Call:
    feeds = make_feeds(shape, seed)
    return Call(feeds, original(feeds), dict(shape), f"prompt {seed}")


def make_swap(base: Call, name: str, value: Array, status: str = "real") -> Swap:
    feeds = {**base.feeds, name: value.astype(np.float32)}
    outputs = original(feeds)
    change = outputs["model_output"] - base.outputs["model_output"]
    effect = Effect(float(np.abs(change).max()), float(np.sqrt((change**2).mean())))
    kept = {"real": "real", "enlarged": "enlarged", "no_influence": "no_influence"}[status]
    return Swap(name, 0, feeds, outputs, kept, effect.max_abs, {"model_output": effect}, "call 1")


def make_recording() -> ComponentRecording:
    calls = tuple(make_call(USUAL, seed) for seed in (0, 1))
    swaps = tuple(
        make_swap(calls[0], spec.name, calls[1].feeds[spec.name]) for spec in CONTRACT.inputs
    )
    shapes = [(USUAL, True), (SMALLEST, True), (LARGEST, True), (UNTRACED, False)]
    shape_calls = tuple(
        ShapeCall(**vars(make_call(shape, 5 + index)), traced=traced)
        for index, (shape, traced) in enumerate(shapes)
    )
    return ComponentRecording(CONTRACT, calls, swaps, shape_calls, FLOORS)


def pairs(shape: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(shape.items()))
