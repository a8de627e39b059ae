"""Layers in two parts, so that each part's input has a range of its own. The sum is the original.

Import this module only where torch is wanted: it imports torch at its top.
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


def _part(whole: torch.nn.Conv2d, columns: slice, bias: Any) -> torch.nn.Conv2d:
    weight = whole.weight.data[:, columns].clone()
    made = torch.nn.Conv2d(
        weight.shape[1],
        whole.out_channels,
        whole.kernel_size,
        whole.stride,
        whole.padding,
        whole.dilation,
        bias=bias is not None,
        device="meta",
    )
    made.weight = torch.nn.Parameter(weight, requires_grad=whole.weight.requires_grad)
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
