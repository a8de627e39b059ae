"""Normalizations. Statistics and results are float32; only the result is rounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffoundry.runtimes.mil.activation import per_channel
from diffoundry.runtimes.mil.registry import Ints, operation


@operation()
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    found = (x - per_channel(mean, x)) / torch.sqrt(per_channel(variance, x) + epsilon)
    return _scaled(found, gamma, beta)


@operation()
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    axes = list(range(2, x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return _scaled((x - mean) / torch.sqrt(variance + epsilon), gamma, beta)


@operation()
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    chosen = sorted(axis % x.dim() for axis in (range(x.dim()) if axes is None else axes))
    last = list(range(x.dim() - len(chosen), x.dim()))
    moved = x.movedim(chosen, last)
    shape = moved.shape[-len(chosen) :]
    return F.layer_norm(moved, shape, gamma, beta, epsilon).movedim(last, chosen)


@operation()
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


@operation()
def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * per_channel(gamma, x)
    return x if beta is None else x + per_channel(beta, x)
