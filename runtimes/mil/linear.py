"""Products: convolutions, matrix products, attention; and pooling, which shares their padding.

Sums are accumulated in float32; only the result is rounded to the stored type.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffoundry.runtimes.mil.activation import per_channel
from diffoundry.runtimes.mil.registry import Ints, operation

Tensors = tuple[Tensor, ...]
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operation()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@operation()
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
    return torch.matmul(x, y)


@operation()
def einsum(values: Tensors, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operation()
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """A boolean mask says which keys take part; a float mask is added."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


@operation()
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    reach = _reach(weight.shape[2:], dilations)
    pairs = pads(pad_type, pad, x.shape[2:], reach, strides)
    padding = tuple(before for before, _ in pairs)
    if any(before != after for before, after in pairs):
        x, padding = _pad(x, pairs, 0.0), (0,) * rank
    return _CONV[rank](x, weight, bias, strides, padding, dilations, groups)


@operation()
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """The whole transposed convolution, then cut (or filled with zeros) to the asked size."""
    rank = x.dim() - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    found = _CONV_TRANSPOSE[rank](
        x, weight, None, strides, groups=groups, dilation=dilations, padding=0
    )
    reach = _reach(weight.shape[2:], dilations)
    for i in range(rank):
        before, after = pad[2 * i : 2 * i + 2] if pad_type == "custom" and pad else (0, 0)
        size = found.shape[2 + i] - before - after
        if pad_type in ("same", "same_lower"):
            size = x.shape[2 + i] * strides[i]
            before = _halves(max(reach[i] - strides[i], 0), pad_type)[0]
        size = output_shape[2 + i] if output_shape else size
        missing = before + size - found.shape[2 + i]
        found = _pad(found, [(0, missing if i == j else 0) for j in range(rank)], 0.0)
        found = found.narrow(2 + i, before, size)
    return found if bias is None else found + per_channel(bias, found)


@operation()
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    return _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -math.inf).amax(-1)


@operation()
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    counted = 0.0 if exclude_padding_from_average else 1.0
    window = kernel_sizes, strides, pad_type, pad, ceil_mode
    count = _windows(torch.ones_like(x), *window, counted, beyond=0.0).sum(-1)
    return _windows(x, *window, 0.0).sum(-1) / count


@operation()
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    found = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    return found.square().sum(-1).sqrt()


def pads(
    pad_type: str, pad: Ints | None, sizes: Ints, reach: Ints, strides: Ints
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension.

    "same" makes ceil(size / stride) outputs and puts an odd element after, "same_lower" before.
    """
    if pad_type == "custom":
        given = pad or (0,) * (2 * len(sizes))
        return list(zip(given[::2], given[1::2], strict=True))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"unknown pad_type {pad_type!r}")
    each = zip(sizes, reach, strides, strict=True)
    totals = [max((-(-size // step) - 1) * step + k - size, 0) for size, k, step in each]
    return [_halves(total, pad_type) for total in totals]


def _halves(total: int, pad_type: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (large, small) if pad_type == "same_lower" else (small, large)


def _reach(kernel: Ints, dilations: Ints) -> Ints:
    """Size of the window that a dilated kernel covers."""
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))


def _pad(x: Tensor, pairs: list[tuple[int, int]], value: float) -> Tensor:
    flat = [max(n, 0) for pair in reversed(pairs) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _windows(
    x: Tensor,
    kernel: Ints,
    strides: Ints | None,
    pad_type: str,
    pad: Ints | None,
    ceil_mode: bool,
    padding: float,
    beyond: float | None = None,
) -> Tensor:
    """Every window of [N, C, …] as [N, C, …, elements]; `beyond` fills what ceil_mode adds."""
    rank = x.dim() - 2
    strides = strides or (1,) * rank
    pairs = pads(pad_type, pad, x.shape[2:], kernel, strides)
    padded = _pad(x, pairs, padding)
    extra = [(0, 0)] * rank
    for i in range(rank if ceil_mode else 0):
        free = padded.shape[2 + i] - kernel[i]
        steps = -(-free // strides[i])
        if steps * strides[i] >= x.shape[2 + i] + pairs[i][0]:
            steps -= 1  # A window that begins in the padding behind is left out.
        extra[i] = (0, steps * strides[i] - free)
    padded = _pad(padded, extra, padding if beyond is None else beyond)
    for i in range(rank):
        padded = padded.unfold(2 + i, kernel[i], strides[i])
    return padded.flatten(2 + rank)
