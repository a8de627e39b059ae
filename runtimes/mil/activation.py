"""Activations, and softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffoundry.runtimes.mil.registry import operation

_GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}


@operation()
def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


@operation()
def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


@operation()
def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


@operation()
def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@operation()
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, per_channel(alpha, x) * x)


@operation()
def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


@operation()
def elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@operation()
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=_GELU[mode])


@operation()
def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * x + beta


@operation()
def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * torch.tanh(beta * x)


@operation()
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@operation()
def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@operation()
def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@operation()
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@operation()
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    scaled = per_channel(beta, x) * x
    return per_channel(alpha, x) * torch.logaddexp(scaled, torch.zeros_like(x))


@operation()
def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@operation()
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """`vector` [C] shaped to be multiplied with `x` [N, C, …]."""
    return vector.reshape(-1, *[1] * (x.dim() - 2))
