"""PyTorch run in float64 throughout, or as fp16 would run, by dispatch modes.

PyTorch's own fp16 on a CPU is up to 144 times slower than fp32, so it is never used.
Imported only where PyTorch is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary


class _Double(TorchDispatchMode):
    """Reads float64 wherever an operation says float32 (diffusers' sinusoids, upcast norms)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))


class EmulatedHalf(TorchDispatchMode):
    """Computes in fp32 and rounds to fp16 what each operation makes of a tensor that is fp16.

    Tensors that count as fp16 are the given ones and all that is made of them; what a model
    computes of others alone stays fp32, as diffusers' sinusoid of the timestep does. A result
    beyond fp16's range keeps its fp32 value, as an engine must keep that operation in fp32;
    `overflowed` then is True.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.overflowed = False
        self._halves = WeakTensorKeyDictionary()
        for tensor in tensors:
            self._halves[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = (v for v in tree_leaves((args, kwargs or {})) if isinstance(v, torch.Tensor))
        if any(tensor in self._halves for tensor in given):
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
                    self._halves[value] = True
                    if not func.is_view:  # a view shows what is rounded already
                        # In place, since an in-place operation returns its own argument.
                        value.copy_(self.rounded(value))
        return result

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        """`value` as fp16 holds it, in fp32; what does not fit stays."""
        half = value.half().float()
        beyond = half.isinf() & value.isfinite()
        if not bool(beyond.any()):
            return half
        self.overflowed = True
        return torch.where(beyond, value, half)


@contextlib.contextmanager
def full_double() -> Iterator[None]:
    """Compute in float64, also where the model's code asks for float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def emulated_half(tensors: Iterable[torch.Tensor]) -> Iterator[EmulatedHalf]:
    """Compute as fp16 does, attention taken apart so that each of its steps is rounded too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), EmulatedHalf(tensors) as mode:
        yield mode
