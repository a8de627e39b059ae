"""Arithmetic, comparisons, logic and functions of single elements.

Integers stay integers: a division is rounded as the operation says, or towards zero when its
result is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffoundry.runtimes.mil.registry import operation


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    def compute(x: Tensor) -> Tensor:
        return function(x)

    operation(name)(compute)


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    operation(name)(compute)


for _name in ("abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2",
              "floor", "logical_not", "sign", "sin", "sinh", "sqrt", "square", "tan",
              "tanh"):  # fmt: skip
    _unary(_name, getattr(torch, _name))
_unary("round", torch.round)  # half to even

for _name in ("add", "sub", "mul", "maximum", "minimum", "pow", "logical_and", "logical_or",
              "logical_xor"):  # fmt: skip
    _binary(_name, getattr(torch, _name))
_binary("mod", torch.remainder)  # the sign of the divisor
_binary("real_div", torch.true_divide)
_binary("floor_div", torch.floor_divide)
_binary("equal", torch.eq)
_binary("not_equal", torch.ne)
_binary("less", torch.lt)
_binary("less_equal", torch.le)
_binary("greater", torch.gt)
_binary("greater_equal", torch.ge)


@operation()
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@operation()
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@operation()
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return 1 / torch.sqrt(x + epsilon)


@operation()
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


@operation()
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha)


@operation()
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


@operation()
def cast(x: Tensor, dtype: str) -> Tensor:
    """The stored type says the rest: floats lose their fraction, a bool is "not zero"."""
    return x != 0 if dtype == "bool" else x


@operation(moves_data=True)
def identity(x: Tensor) -> Tensor:
    return x
