"""Layers in parts: so that each part's input has a range of its own, or for less work.

Together the parts are the original. Import this module only where torch is wanted: it imports
torch at its top.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253

from diffoundry.errors import ModelError


class SplitConvolution(torch.nn.Module):
    """conv(cat(a, b)) = first(a) + second(b), where a are the first `channels` of the input.

    [batch, in, height, width] -> [batch, out, ...]. The bias is the first's.
    """

    def __init__(self, whole: torch.nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.first = _part(whole, slice(None, channels), whole.bias)
        self.second = _part(whole, slice(channels, None), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.first(x[:, : self.channels]) + self.second(x[:, self.channels :])
        return made


class SplitFirstToken(torch.nn.Module):
    """The first token through a linear layer of its own, the others through another of the same
    weights. [batch, tokens, in] -> [batch, tokens, out].

    The first token of a CLIP prompt is the same for every prompt, and its outliers would eat the
    range (MixDQ, arXiv 2405.17873, section 4.1).
    """

    def __init__(self, whole: torch.nn.Linear) -> None:
        super().__init__()
        self.first_token = _copy(whole)
        self.rest = _copy(whole)

    @property
    def in_features(self) -> int:
        return int(self.rest.in_features)

    @property
    def out_features(self) -> int:
        return int(self.rest.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first_token(x[:, :1]), self.rest(x[:, 1:])], dim=1)


class SplitDoubling(torch.nn.Module):
    """whole(x, each pixel repeated to 2 x 2) = four convolutions of x, one for each of the pixels.

    [batch, in, height, width] -> [batch, out, 2 height, 2 width]. Of the nine values that the
    whole, 3 x 3, reads four are different ones: its weights are added up to 2 x 2, and 16 products
    are enough where 36 were.
    """

    def __init__(self, whole: torch.nn.Conv2d) -> None:
        super().__init__()
        self.even_even = _pixel(whole, 0, 0)
        self.even_odd = _pixel(whole, 0, 1)
        self.odd_even = _pixel(whole, 1, 0)
        self.odd_odd = _pixel(whole, 1, 1)

    @property
    def in_channels(self) -> int:
        return int(self.even_even.in_channels)

    @property
    def out_channels(self) -> int:
        return int(self.even_even.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        # Each convolution gives a row and a column too many, at its pixel's far side.
        parts = [
            self.even_even(x)[:, :, :-1, :-1],
            self.even_odd(x)[:, :, :-1, 1:],
            self.odd_even(x)[:, :, 1:, :-1],
            self.odd_odd(x)[:, :, 1:, 1:],
        ]
        apart = torch.cat(parts, dim=1).reshape(batch, 2, 2, self.out_channels, height, width)
        made = apart.permute(0, 3, 4, 1, 5, 2)
        return made.reshape(batch, self.out_channels, 2 * height, 2 * width)


def _pixel(whole: torch.nn.Conv2d, row: int, column: int) -> torch.nn.Conv2d:
    """The 2 x 2 convolution, padded by 1, of the even (0) or odd (1) rows and columns."""
    weight = _added(_added(whole.weight.data.double(), 2, row), 3, column).to(whole.weight.dtype)
    return _convolution(weight, whole.bias, whole.weight.requires_grad, padding=1)


def _added(weight: torch.Tensor, dim: int, odd: int) -> torch.Tensor:
    """What reads the same pixel of the smaller plane, added up: 3 along `dim` become 2."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first + middle, last] if odd else [first, middle + last], dim)


def _part(whole: torch.nn.Conv2d, columns: slice, bias: Any) -> torch.nn.Conv2d:
    weight = whole.weight.data[:, columns].clone()
    return _convolution(
        weight,
        bias,
        whole.weight.requires_grad,
        stride=whole.stride,
        padding=whole.padding,
        dilation=whole.dilation,
    )


def _convolution(weight: torch.Tensor, bias: Any, gradient: bool, **how: Any) -> torch.nn.Conv2d:
    """With these weights and a copy of the bias, where there is one."""
    made = torch.nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        bias=bias is not None,
        device="meta",
        **how,
    )
    made.weight = torch.nn.Parameter(weight, requires_grad=gradient)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias.data.clone(), requires_grad=bias.requires_grad)
    return made


def _copy(whole: torch.nn.Linear) -> torch.nn.Linear:
    made = torch.nn.Linear(
        whole.in_features, whole.out_features, bias=whole.bias is not None, device="meta"
    )
    for name, value in whole.named_parameters():
        copy = torch.nn.Parameter(value.data.clone(), requires_grad=value.requires_grad)
        setattr(made, name, copy)
    return made


def split_convolution(network: torch.nn.Module, name: str, channels: int) -> None:
    """Put the convolution `name` of `network` in two parts, in place. Raises ModelError where that
    is no ordinary convolution of more than `channels` channels."""
    layer = dict(network.named_modules()).get(name)
    fits = isinstance(layer, torch.nn.Conv2d) and layer.groups == 1
    if not fits or not 0 < channels < layer.in_channels or layer.padding_mode != "zeros":  # type: ignore[union-attr]
        raise _not_there(name, f"a convolution of more than {channels} channels, one group", layer)
    _put(network, name, SplitConvolution(layer, channels))


def split_first_token(network: torch.nn.Module, name: str) -> None:
    """Give the first token a linear layer of its own, in place. Raises ModelError where `name` is
    no linear layer."""
    layer = dict(network.named_modules()).get(name)
    if not isinstance(layer, torch.nn.Linear):
        raise _not_there(name, "a linear layer", layer)
    _put(network, name, SplitFirstToken(layer))


def split_doubling(network: torch.nn.Module, name: str) -> None:
    """Put the convolution `name` behind a doubling of the plane in four, in place: it doubles the
    plane itself from then on. Raises ModelError where that is no such convolution."""
    if name not in doubling_convolutions(network):
        raise _not_there(
            name, "a 3 x 3 convolution behind a doubling", dict(network.named_modules()).get(name)
        )
    parent, _, last = name.rpartition(".")
    before = network.get_submodule(parent)
    if isinstance(before, torch.nn.Sequential):
        before[int(last) - 1] = torch.nn.Identity()
    else:
        before.interpolate = False
    _put(network, name, SplitDoubling(network.get_submodule(name)))


def doubling_convolutions(network: torch.nn.Module) -> tuple[str, ...]:
    """Convolutions that read a plane whose pixels were repeated just before: diffusers' Upsample2D,
    and an Upsample in front of a convolution (AutoencoderTiny)."""
    from diffusers.models.upsampling import Upsample2D

    found = []
    for name, module in network.named_modules():
        if isinstance(module, Upsample2D):
            if module.interpolate and _fits(getattr(module, "conv", None)):
                found.append(f"{name}.conv")
        elif isinstance(module, torch.nn.Sequential):
            for place in range(1, len(module)):
                if _doubles(module[place - 1]) and _fits(module[place]):
                    found.append(f"{name}.{place}")
    return tuple(found)


def _doubles(module: torch.nn.Module) -> bool:
    return (
        isinstance(module, torch.nn.Upsample)
        and module.mode == "nearest"
        and module.scale_factor in (2, (2, 2))
    )


def _fits(layer: Any) -> bool:
    return (
        isinstance(layer, torch.nn.Conv2d)
        and (layer.kernel_size, layer.stride) == ((3, 3), (1, 1))
        and (layer.padding, layer.dilation) == ((1, 1), (1, 1))
        and (layer.groups, layer.padding_mode) == (1, "zeros")
    )


def _put(network: torch.nn.Module, name: str, made: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, made)


def _not_there(name: str, expected: str, found: Any) -> ModelError:
    return ModelError(
        f"surgery: split of {name!r}",
        expected=expected,
        found="none such" if found is None else str(found),
        remedy="config.json and surgery.json come from different models",
    )
