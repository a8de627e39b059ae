"""What a quantization plan means, in PyTorch: fake quantization, the reference of every backend.

Weights are put on their grids once and kept there in 8 bits; one layer's are float32 at a time,
while it computes. Inputs are rounded to their grids by hooks. Everything is computed in float32,
so no backend's own way of rounding is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffoundry.formats.quant_plan import (
    WEIGHT_STEPS,
    Grid,
    LayerPlan,
    QuantPlan,
    Range,
    grid_of,
    refuse_missing,
)

if TYPE_CHECKING:
    import torch


@contextmanager
def simulated(module: torch.nn.Module, plan: QuantPlan) -> Iterator[None]:
    """`module` computes as `plan` says inside the `with`; afterwards it is as before.

    Raises ArtifactError that names every layer of the plan which the module does not have.
    """
    import torch

    layers = dict(module.named_modules())
    refuse_missing(plan, layers.keys() | set(), "simulator")
    undo: list[Callable[[], None]] = []
    try:
        with torch.no_grad():
            for entry in plan.layers:
                if entry.scheme != "float":
                    undo += apply_layer(layers[entry.module], entry, plan)
        yield
    finally:
        for step in reversed(undo):
            step()


@contextmanager
def quantized(layer: Any, entry: LayerPlan, plan: QuantPlan) -> Iterator[None]:
    """One layer computes as `plan` says inside the `with`."""
    undo = apply_layer(layer, entry, plan)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def apply_layer(layer: Any, entry: LayerPlan, plan: QuantPlan) -> list[Callable[[], None]]:
    """Quantize one layer in place; return what takes it back.

    The layer's own weights may be mapped from a file: beside them stands a quarter of their size.
    """
    import torch

    weight, bias = layer.weight.data, getattr(layer, "bias", None)
    scale = torch.from_numpy(plan.weight_scale(entry.module))
    steps, scale = _integers(weight, scale), _beside(weight, scale)

    def put(_: Any, __: Any) -> None:
        layer.weight.data = steps.to(weight.dtype).mul_(scale)

    def take_back(*_: Any) -> None:
        layer.weight.data = weight

    undo: list[Callable[[], None]] = [
        take_back,
        layer.register_forward_pre_hook(put).remove,
        layer.register_forward_hook(take_back).remove,
    ]
    corrected = plan.bias(entry.module)
    if corrected is not None:
        undo.append(_set_bias(layer, bias, torch.from_numpy(corrected)))
    if entry.integer_kernel:
        handle = layer.register_forward_pre_hook(_input_hook(entry))
        undo.append(handle.remove)
    if entry.output is not None:
        grid = grid_of(entry.output, entry.symmetric)
        handle = layer.register_forward_hook(lambda _, __, out: fake(out, grid))
        undo.append(handle.remove)
    return undo


def _set_bias(layer: Any, bias: torch.nn.Parameter | None, value: Any) -> Callable[[], None]:
    import torch

    layer.bias = torch.nn.Parameter(value.to(layer.weight.dtype), requires_grad=False)
    return lambda: setattr(layer, "bias", bias)


def _input_hook(entry: LayerPlan) -> Callable[[Any, tuple[Any, ...]], Any]:
    def on_grid(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        span = entry.activation
        if entry.scheme == "dynamic":
            span = Range(float(x.min()), float(x.max()))
        assert span is not None
        return (fake(x, grid_of(span, entry.symmetric)), *inputs[1:])

    return on_grid


def fake(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`x` rounded to the grid and back, any shape, its own dtype."""
    import torch

    zero = grid.signed_zero_point
    steps = torch.clamp(torch.round(x / grid.scale) + zero, -128, 127)
    return (steps - zero) * grid.scale


def fake_weight(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight` [out, ...] on its symmetric grid of scale [out], and back."""
    import torch

    shaped = _beside(weight, scale)
    return torch.clamp(torch.round(weight / shaped), -WEIGHT_STEPS, WEIGHT_STEPS) * shaped


def _integers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight` [out, ...] on its grid, int8, in place of one copy."""
    import torch

    steps = (weight / _beside(weight, scale)).round_().clamp_(-WEIGHT_STEPS, WEIGHT_STEPS)
    return steps.to(torch.int8)


def _beside(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale [out] as it is multiplied with `weight` [out, ...]."""
    return scale.reshape(-1, *(1,) * (weight.ndim - 1)).to(weight.dtype)
