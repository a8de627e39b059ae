"""Which layers of a component may become INT8, and what each is to be unless something speaks
against it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import WEIGHT_STEPS, LayerPlan, Scheme, integer_weight
from diffoundry.types import Array

if TYPE_CHECKING:
    import torch

Kind = Literal["conv", "linear", "embedding"]
WeightMethod = Literal["minmax", "mse"]

KEEP = (
    "*conv_in",
    "*conv_out",
    "*time_embedding.*",
    "*time_emb_proj",
    "*conv_shortcut",
    "*.first_token",
)
"""Layers whose activations stay in float (their weights become INT8 all the same): the list that
MixDQ (arXiv 2405.17873) and NVIDIA's ModelOpt recipe agree on for few-step U-Nets."""

_SHRINKS = np.linspace(0.6, 1.0, 21)


def find_layers(module: torch.nn.Module) -> dict[str, Kind]:
    """Qualified name -> kind of every convolution, linear layer and embedding table with a weight
    of its own, in the order of the modules."""
    import torch

    kinds: tuple[tuple[type[Any], Kind], ...] = (
        (torch.nn.Conv2d, "conv"),
        (torch.nn.Linear, "linear"),
        (torch.nn.Embedding, "embedding"),
    )
    found: dict[str, Kind] = {}
    for name, layer in module.named_modules():
        for wanted, kind in kinds:
            if isinstance(layer, wanted):
                found[name] = kind
    return found


def outline(
    layers: Mapping[str, Kind],
    schemes: Mapping[Kind, Scheme],
    keep: Sequence[str],
    in_float: Sequence[str],
    symmetric: bool,
) -> tuple[LayerPlan, ...]:
    """A plan's layers without ranges. `keep`: patterns of names whose activations stay in float;
    `in_float`: whose weights do too. Raises StageError for a pattern that meets no layer."""
    made = []
    for name, kind in layers.items():
        layer = LayerPlan(name, kind, schemes[kind], symmetric=symmetric)
        kept = _match(name, keep)
        whole = _match(name, in_float)
        if whole:
            layer = dataclasses.replace(layer, scheme="float", why=f"kept whole: {whole}")
        elif kept and layer.integer_kernel:
            layer = dataclasses.replace(layer, scheme="weight_only", why=f"keep-list: {kept}")
        made.append(layer)
    idle = [p for p in in_float if not any(fnmatch.fnmatchcase(name, p) for name in layers)]
    if idle:
        raise StageError(
            "quantization: in_float",
            expected="patterns that meet a layer",
            found=f"none for {', '.join(idle)}",
            remedy=f"layers are called like {next(iter(layers), 'none')}",
        )
    return tuple(made)


def _match(name: str, patterns: Sequence[str]) -> str:
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), "")


def weight_scale(weight: Array, method: WeightMethod) -> Array:
    """Per output channel, float32 [out], of a weight [out, ...].

    minmax: the largest value is 127. mse: of 21 shrunk scales, the one with the least square
    error. A channel of zeros gets the scale 1.
    """
    flat = np.asarray(weight, dtype=np.float32).reshape(len(weight), -1)
    largest = np.abs(flat).max(axis=1)
    full = np.where(largest > 0, largest / WEIGHT_STEPS, 1.0).astype(np.float32)
    if method == "minmax":
        return full
    best, error = full.copy(), np.where(largest > 0, np.inf, 0.0)
    for shrink in _SHRINKS:
        scale = (full * shrink).astype(np.float32)
        back = integer_weight(flat, scale) * scale[:, None]
        found = np.square(back - flat).sum(axis=1)
        better = found < error
        best[better], error[better] = scale[better], found[better]
    return best


def corrected_bias(weight: Array, scale: Array, bias: Array | None, mean: Array) -> Array:
    """The bias plus what rounding the weights takes from the mean output, float32 [out]
    (bias correction as in Nagel et al. 2019, arXiv 1906.04721, section 4.2; of a convolution with
    the mean of each channel at every position of the kernel)."""
    lost = weight - integer_weight(weight, scale) * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    lost = lost.reshape(*lost.shape[:2], -1).sum(axis=2)
    own = np.zeros(len(weight)) if bias is None else bias
    return (own + lost @ mean).astype(np.float32)
