"""Quantization-aware recovery: training with the plan's rounding in the loop.

Rounding passes gradients as if it were not there (straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432); values outside a range get none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffoundry.compression.layers import weight_scale
from diffoundry.compression.recovery import recover
from diffoundry.compression.simulator import fake, fake_weight
from diffoundry.formats.quant_plan import (
    WEIGHT_STEPS,
    LayerPlan,
    QuantPlan,
    Range,
    grid_of,
    refuse_missing,
)

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract


def recover_quantized(
    module: torch.nn.Module,
    plan: QuantPlan,
    contract: Contract,
    calls: Sequence[Call],
    steps: int,
    rate: float,
    batch: int = 8,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[QuantPlan, float]:
    """Train `module` in place so that it answers `calls` under `plan` as the original did.

    Returns the plan with weight scales of the trained weights, and the last losses. Ranges of
    activations stay: the weights were trained against them. A corrected bias becomes the layer's
    own where it has one, and is trained on.
    """
    plan = _take_over_biases(module, plan)
    with straight_through(module, plan):
        loss = recover(module, contract, calls, steps, rate, batch, say=say)
    method = plan.settings.get("weight_ranges", "minmax")
    layers = dict(module.named_modules())
    tensors = dict(plan.tensors)
    for entry in plan.layers:
        if entry.integer_weight:
            weight: Any = layers[entry.module].weight
            tensors[f"{entry.module}.weight_scale"] = weight_scale(weight.detach().numpy(), method)
    settings = {**plan.settings, "recovered": {"steps": steps, "rate": rate, "batch": batch}}
    return dataclasses.replace(plan, settings=settings, tensors=tensors), loss


def _take_over_biases(module: torch.nn.Module, plan: QuantPlan) -> QuantPlan:
    import torch

    layers = dict(module.named_modules())
    refuse_missing(plan, layers.keys() | set(), "quantization-aware recovery")
    tensors = dict(plan.tensors)
    for entry in plan.layers:
        corrected, own = plan.bias(entry.module), getattr(layers[entry.module], "bias", None)
        if corrected is not None and own is not None:
            own.data = torch.tensor(corrected, dtype=own.dtype)  # the plan keeps its own
            del tensors[f"{entry.module}.bias"]
    return dataclasses.replace(plan, tensors=tensors)


@contextmanager
def straight_through(module: torch.nn.Module, plan: QuantPlan) -> Iterator[None]:
    """`module` computes as `plan` says, with gradients; afterwards its (trained) float weights are
    its own again."""
    layers = dict(module.named_modules())
    with ExitStack() as stack:
        for entry in plan.layers:
            if entry.scheme != "float":
                _prepare(layers[entry.module], entry, plan, stack)
        yield


def _prepare(layer: Any, entry: LayerPlan, plan: QuantPlan, stack: ExitStack) -> None:
    import torch
    from torch.nn.utils import parametrize

    fixed = None
    if plan.settings.get("weight_ranges", "minmax") != "minmax":
        fixed = torch.from_numpy(plan.weight_scale(entry.module).copy())
    parametrize.register_parametrization(layer, "weight", _rounding()(fixed), unsafe=True)
    stack.callback(parametrize.remove_parametrizations, layer, "weight", leave_parametrized=False)
    if entry.integer_kernel:
        hook = layer.register_forward_pre_hook(_input_hook(entry))
        stack.callback(hook.remove)
    extra = plan.bias(entry.module)
    if extra is not None or entry.output is not None:
        hook = layer.register_forward_hook(_output_hook(layer, entry, extra))
        stack.callback(hook.remove)


def _rounding() -> Any:
    import torch

    class Rounded(torch.nn.Module):
        """A weight on its grid; the scale follows the weight unless it is `fixed`."""

        def __init__(self, fixed: torch.Tensor | None) -> None:
            super().__init__()
            self.fixed = fixed

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            scale = self.fixed
            with torch.no_grad():
                if scale is None:
                    largest = weight.flatten(1).abs().amax(1) / WEIGHT_STEPS
                    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
                noise = fake_weight(weight, scale) - weight
            return weight + noise

    return Rounded


def _input_hook(entry: LayerPlan) -> Callable[[Any, tuple[Any, ...]], Any]:
    def on_grid(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        span = entry.activation
        if entry.scheme == "dynamic":
            span = Range(float(x.detach().min()), float(x.detach().max()))
        assert span is not None
        return (_through(x, span, entry.symmetric), *inputs[1:])

    return on_grid


def _output_hook(layer: Any, entry: LayerPlan, extra: Any) -> Callable[..., Any]:
    import torch

    def shifted(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        if extra is not None:
            bias = torch.from_numpy(extra)
            is_conv = isinstance(layer, torch.nn.Conv2d)
            output = output + (bias.reshape(-1, 1, 1) if is_conv else bias)
        if entry.output is not None:
            output = _through(output, entry.output, entry.symmetric)
        return output

    return shifted


def _through(x: torch.Tensor, span: Range, symmetric: bool) -> torch.Tensor:
    """`x` on its grid; gradients pass where the grid reaches."""
    import torch

    grid = grid_of(span, symmetric)
    zero = grid.signed_zero_point
    inside = torch.clamp(x, (-128 - zero) * grid.scale, (127 - zero) * grid.scale)
    return inside + (fake(x, grid) - inside).detach()
