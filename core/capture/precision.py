"""PyTorch run in float64 throughout, or as fp16 or bfloat16 would run, by dispatch modes.

PyTorch's own fp16 on a CPU is up to 144 times slower than fp32, so it is never used.
Imported only where PyTorch is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary


class _Double(TorchDispatchMode):
    """Reads float64 wherever an operation says float32 (diffusers' sinusoids, upcast norms).

    Weights are widened by each operation that reads them, and let go of behind it: a network in
    float64 is never held as a whole.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


class _DoubleConvolution(TorchFunctionMode):
    """The same before a convolution compares the dtypes of input and bias, above the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            return func(*map(_widened, args), **tree_map(_widened, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype is torch.float32 else value
    return torch.float64 if value is torch.float32 else value


class EmulatedHalf(TorchDispatchMode):
    """Computes in fp32 and rounds to `dtype` (float16 or bfloat16) what each operation makes of a
    tensor that is half.

    Tensors that count as half are `halves`, which are rounded already, and `weights`, which each
    operation that reads them rounds for itself: no second copy of a network is held. So does all
    that is made of them; what a model computes of others alone stays fp32, as diffusers' sinusoid
    of the timestep does. A result beyond fp16's range keeps its fp32 value, as an engine must keep
    that operation in fp32; `overflowed` then is True.
    """

    def __init__(
        self,
        weights: Iterable[torch.Tensor],
        halves: Iterable[torch.Tensor] = (),
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.overflowed = False
        self._halves = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()
        for tensor in weights:
            self._weights[tensor] = True
        for tensor in halves:
            self._halves[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = False

        def taken(value: Any) -> Any:
            nonlocal counts
            if not isinstance(value, torch.Tensor):
                return value
            is_weight = value in self._weights
            counts = counts or is_weight or value in self._halves
            return _fitting_half(value, self.dtype) if is_weight else value

        result = func(*tree_map(taken, args), **tree_map(taken, kwargs or {}))
        if counts:
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
                    self._halves[value] = True
                    if not func.is_view:  # a view shows what is rounded already
                        # In place, since an in-place operation returns its own argument.
                        value.copy_(self.rounded(value))
        return result

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """`value` as `dtype` holds it, in fp32; what does not fit stays."""
        half = value.to(self.dtype).float()
        beyond = half.isinf() & value.isfinite()
        if not bool(beyond.any()):
            return half
        self.overflowed = True
        return torch.where(beyond, value, half)


def _fitting_half(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as `dtype` holds it, in fp32; what does not fit stays."""
    half = weight.to(dtype).float()
    return half.where(half.isfinite(), weight)


@contextlib.contextmanager
def full_double() -> Iterator[None]:
    """Compute in float64, also where the model's code asks for float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _DoubleConvolution(), _Double():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def emulated_half(
    weights: Iterable[torch.Tensor],
    halves: Iterable[torch.Tensor] = (),
    dtype: torch.dtype = torch.float16,
) -> Iterator[EmulatedHalf]:
    """Compute as `dtype` does, attention taken apart so that each of its steps is rounded too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), EmulatedHalf(weights, halves, dtype) as mode:
        yield mode
