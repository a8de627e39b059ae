"""Quantization plans of the tiny network, made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from diffoundry.compression.layers import find_layers, weight_scale
from diffoundry.compression.simulator import simulated
from diffoundry.formats import quant_plan
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range, Scheme
from diffoundry.types import Array, Artifact, ArtifactType
from tests.exporters import tiny_tflite as tiny

SCHEMES: Mapping[str, Scheme] = {
    "words": "weight_only",
    "wide": "dynamic",
    "narrow": "static",
    "conv_in": "static",
    "conv_out": "dynamic",
}
"""Each scheme once, and each kind of layer."""


def make_plan(schemes: Mapping[str, Scheme] = SCHEMES, **changes: object) -> QuantPlan:
    """A plan with the ranges of one call."""
    network = tiny.tiny_network()
    layers = dict(network.named_modules())
    ranges: dict[str, tuple[Range, Range]] = {}

    def watch(name: str) -> None:
        def see(_: object, taken: tuple[torch.Tensor, ...], given: torch.Tensor) -> None:
            ranges[name] = (_range(taken[0]), _range(given))

        layers[name].register_forward_hook(see)

    for name, kind in find_layers(network).items():
        if kind != "embedding":
            watch(name)
    feeds = tiny.feeds_at(tiny.USUAL)
    with torch.inference_mode():
        network(*(torch.from_numpy(value) for value in feeds.values()))
    made, tensors = [], {}
    for name, kind in find_layers(network).items():
        layer = LayerPlan(name, kind, schemes.get(name, "float"))
        if layer.integer_weight:
            weight = layers[name].weight.detach().numpy()  # type: ignore[union-attr,operator]
            tensors[f"{name}.weight_scale"] = weight_scale(weight, "minmax")
        if layer.scheme == "static":
            layer = dataclasses.replace(layer, activation=ranges[name][0], output=ranges[name][1])
        made.append(dataclasses.replace(layer, **changes))  # type: ignore[arg-type]
    return QuantPlan("unet", "by hand", {}, tuple(made), tensors)


def _range(x: torch.Tensor) -> Range:
    return Range(float(x.min()), float(x.max()))


def saved(plan: QuantPlan, folder: Path) -> Artifact:
    """The plan in `folder` / plan."""
    quant_plan.save(folder / "plan", plan)
    digest = quant_plan.digest(folder / "plan")
    return Artifact(ArtifactType(quant_plan.KIND), folder / "plan", digest, "unet")


def simulation(plan: QuantPlan, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What the plan means."""
    network = tiny.tiny_network()
    with torch.inference_mode(), simulated(network, plan):
        found = network(*(torch.from_numpy(value) for value in feeds.values()))
    return {s.name: v.numpy() for s, v in zip(tiny.CONTRACT.outputs, found, strict=True)}


def sqnr_db(wanted: Array, found: Array) -> float:
    """Of two arrays of one shape."""
    noise = np.mean(np.square(wanted.astype(np.float64) - found))
    return float(10 * np.log10(np.mean(np.square(wanted.astype(np.float64))) / noise))
