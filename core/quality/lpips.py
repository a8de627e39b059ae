"""LPIPS: how different two pictures look, by the features of VGG16 or AlexNet (local weights).

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
version 0.1. Import this module only where torch is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffoundry.errors import ContractError, ModelError
from diffoundry.formats.safetensors_file import read_header
from diffoundry.quality.resizing import resize
from diffoundry.quality.weights import check_safetensors, load_tensors
from diffoundry.types import Array

WHERE = "LPIPS weights"
SMALLEST = 64
"""The shorter side, in pixels, that a picture is enlarged to where it is smaller: the paper's."""
# What the networks' ImageNet normalisation becomes for pixels in -1..1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Layer:
    """A convolution and its ReLU. `index`: its place in torchvision's `features`; `slice`: where
    the lpips package puts it; `tapped`: its output is compared."""

    index: int
    channels: int
    slice: int
    tapped: bool = False
    pool: bool = False
    """A maximum over `Trunk.pool` with stride 2 comes before it."""
    size: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Trunk:
    """A network up to its last compared layer; `pool`: side of its maxima."""

    name: str
    layers: tuple[Layer, ...]
    pool: int


VGG16 = Trunk(
    "VGG16",
    (
        Layer(0, 64, 1), Layer(2, 64, 1, True),
        Layer(5, 128, 2, pool=True), Layer(7, 128, 2, True),
        Layer(10, 256, 3, pool=True), Layer(12, 256, 3), Layer(14, 256, 3, True),
        Layer(17, 512, 4, pool=True), Layer(19, 512, 4), Layer(21, 512, 4, True),
        Layer(24, 512, 5, pool=True), Layer(26, 512, 5), Layer(28, 512, 5, True),
    ),
    pool=2,
)  # fmt: skip
ALEXNET = Trunk(
    "AlexNet",
    (
        Layer(0, 64, 1, True, size=11, stride=4, padding=2),
        Layer(3, 192, 2, True, pool=True, size=5, padding=2),
        Layer(6, 384, 3, True, pool=True),
        Layer(8, 256, 4, True),
        Layer(10, 256, 5, True),
    ),
    pool=3,
)


@dataclass(frozen=True)
class Lpips:
    """An opened metric: the trunk and its tensors, float32."""

    trunk: Trunk
    tensors: dict[str, Tensor]

    def distances(self, ones: Sequence[Array], others: Sequence[Array]) -> Array:
        """LPIPS of each pair of uint8 pictures [h, w, 3] of one size: float32 [n], 0 or more.

        No resizing, as in the reference implementation, except that a side below 64 pixels is
        enlarged. Raises ContractError where a pair differs in size.
        """
        found = []
        with torch.no_grad():
            for one, other in zip(ones, others, strict=True):
                if one.shape != other.shape:
                    raise ContractError(
                        "LPIPS",
                        expected="two pictures of one size",
                        found=f"{list(one.shape)} and {list(other.shape)}",
                    )
                found.append(self._distance(_pixels(one), _pixels(other)))
        return np.array(found, np.float32)

    def _distance(self, one: Tensor, other: Tensor) -> float:
        total = 0.0
        taps = self._taps(torch.cat([one, other]))
        for number, tap in enumerate(taps):
            unit = tap / (tap.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[:1] - unit[1:]).square()
            weighted = functional.conv2d(difference, self.tensors[f"lin{number}.model.1.weight"])
            total += float(weighted.mean())
        return total

    def _taps(self, x: Tensor) -> list[Tensor]:
        taps = []
        for layer in self.trunk.layers:
            if layer.pool:
                x = functional.max_pool2d(x, self.trunk.pool, 2)
            weight, bias = (self.tensors[f"features.{layer.index}.{p}"] for p in ("weight", "bias"))
            x = functional.relu(functional.conv2d(x, weight, bias, layer.stride, layer.padding))
            if layer.tapped:
                taps.append(x)
        return taps


def wanted_tensors(trunk: Trunk) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name -> shape, and its names in a file: torchvision's, or the lpips package's."""
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    before, heads = 3, 0
    for layer in trunk.layers:
        shapes = {"weight": (layer.channels, before, layer.size, layer.size)}
        for part, shape in {**shapes, "bias": (layer.channels,)}.items():
            ours = f"features.{layer.index}.{part}"
            wanted[ours] = (shape, (ours, f"net.slice{layer.slice}.{layer.index}.{part}"))
        if layer.tapped:
            head = f"lin{heads}.model.1.weight"
            wanted[head] = ((1, layer.channels, 1, 1), (head,))
            heads += 1
        before = layer.channels
    return wanted


def open_lpips(path: Path) -> Lpips:
    """The metric with the file's weights; the first convolution says which trunk it is.

    Raises ModelError.
    """
    check_safetensors(path, WHERE)
    header = read_header(path)
    first = header.get("features.0.weight") or header.get("net.slice1.0.weight")
    # Without a first convolution VGG16's names are listed as missing.
    trunk = ALEXNET if first is not None and first.shape[2:] == (11, 11) else VGG16
    tensors = load_tensors(path, f"{WHERE} ({trunk.name})", wanted_tensors(trunk))
    if any(bool((v < 0).any()) for name, v in tensors.items() if name.startswith("lin")):
        raise ModelError(
            f"{WHERE} {path}",
            expected="heads without negative weights: a distance is never negative",
            found="a negative weight in lin*.model.1.weight",
            remedy="use the trained heads, not random ones",
        )
    return Lpips(trunk, tensors)


def _pixels(picture: Array) -> Tensor:
    """uint8 [h, w, 3] -> [1, 3, h, w] as the trunk wants it."""
    height, width = picture.shape[:2]
    shorter = min(height, width)
    if shorter < SMALLEST:
        height, width = (round(side * SMALLEST / shorter) for side in (height, width))
    values = resize(picture, height, width, rounded=False) / 127.5 - 1
    scaled = (values - np.array(SHIFT, np.float32)) / np.array(SCALE, np.float32)
    return torch.from_numpy(scaled.transpose(2, 0, 1)[None].astype(np.float32))
