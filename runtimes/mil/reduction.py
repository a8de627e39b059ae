"""Reductions over axes (all of them where none are given)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffoundry.runtimes.mil.registry import Ints, operation


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    def compute(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, list(range(x.dim()) if axes is None else axes), keep_dims)

    operation(name)(compute)


def _product(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep_dims)
    return x


_reduction("reduce_sum", lambda x, axes, keep: x.sum(axes, keepdim=keep))
_reduction("reduce_mean", lambda x, axes, keep: x.float().mean(axes, keepdim=keep))
_reduction("reduce_max", lambda x, axes, keep: x.amax(axes, keepdim=keep))
_reduction("reduce_min", lambda x, axes, keep: x.amin(axes, keepdim=keep))
_reduction("reduce_prod", _product)
_reduction("reduce_sum_square", lambda x, axes, keep: x.square().sum(axes, keepdim=keep))
_reduction("reduce_l1_norm", lambda x, axes, keep: x.abs().sum(axes, keepdim=keep))
_reduction("reduce_l2_norm", lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt())
_reduction("reduce_log_sum", lambda x, axes, keep: x.sum(axes, keepdim=keep).log())
_reduction("reduce_log_sum_exp", lambda x, axes, keep: x.float().logsumexp(axes, keepdim=keep))


@operation()
def reduce_argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return x.argmax(axis, keepdim=keep_dims)


@operation()
def reduce_argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return x.argmin(axis, keepdim=keep_dims)


@operation()
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    found = x.cumsum(axis)
    found = found - x if exclusive else found
    return found.flip(axis) if reverse else found


@operation()
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return x.argsort(dim=axis, descending=not ascending, stable=True)


@operation()
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    values, indices = x.sort(dim=axis, descending=not ascending, stable=True)
    found = values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
    return found if return_indices else found[:1]
