"""SmoothQuant as an exact rewrite: what is hard to quantize in a linear layer's input moves into
its weights, and the scale into whatever made that input.

Y = (X / s) (s W), s_j = max|X_j|^alpha / max|W_j|^(1 − alpha) (Xiao et al. 2023, arXiv 2211.10438,
section 4.1). Linear layers only: on convolutions it can wreck the net.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffoundry.compression.statistics import feeds_of
from diffoundry.errors import StageError

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

_LEAST, _MOST = 1e-3, 1e3


@dataclass(frozen=True)
class Fold:
    """Layers that read one value, and what makes it: a norm with a scale of its own, or the rows
    [0, width) of a linear layer."""

    producer: str
    consumers: tuple[str, ...]
    rows: int | None = None


def find_folds(network: torch.nn.Module) -> tuple[Fold, ...]:
    """Every place in the network where a scale can move, in the order of its modules."""
    found: list[Fold] = []
    for name, block in network.named_modules():
        find = _FINDERS.get(type(block).__name__)
        if find is not None:
            found += find(f"{name}." if name else "", block)
    return tuple(fold for fold in found if _fits(network, fold))


def _transformer(name: str, block: Any) -> Iterator[Fold]:
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        return
    if block.attn1 is not None and not block.only_cross_attention:
        yield Fold(f"{name}norm1", tuple(f"{name}attn1.{part}" for part in _QUERY_KEY_VALUE))
    if block.attn2 is not None and block.attn2.is_cross_attention:
        yield Fold(f"{name}norm2", (f"{name}attn2.to_q",))
    yield Fold(f"{name}norm3", (f"{name}ff.net.0.proj",))


def _attention(name: str, block: Any) -> Iterator[Fold]:
    plain = all(getattr(block, extra, None) is None for extra in ("spatial_norm", "norm_cross"))
    if not plain or block.inner_dim != block.inner_kv_dim:
        return
    if block.group_norm is not None and not block.is_cross_attention:
        yield Fold(f"{name}group_norm", tuple(f"{name}{part}" for part in _QUERY_KEY_VALUE))
    # A weighted mean of values is as scaled as they are.
    yield Fold(f"{name}to_v", (f"{name}to_out.0",), int(block.inner_dim))


def _feed_forward(name: str, block: Any) -> Iterator[Fold]:
    if type(block.net[0]).__name__ == "GEGLU":  # value × gelu(gate): linear in the value
        yield Fold(f"{name}net.0.proj", (f"{name}net.2",), int(block.net[2].in_features))


def _clip_layer(name: str, block: Any) -> Iterator[Fold]:
    parts = tuple(f"{name}self_attn.{part}_proj" for part in "qkv")
    yield Fold(f"{name}layer_norm1", parts)
    yield Fold(f"{name}layer_norm2", (f"{name}mlp.fc1",))
    values = int(block.self_attn.v_proj.out_features)
    yield Fold(f"{name}self_attn.v_proj", (f"{name}self_attn.out_proj",), values)


_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
_FINDERS: Mapping[str, Any] = {
    "BasicTransformerBlock": _transformer,
    "Attention": _attention,
    "FeedForward": _feed_forward,
    "CLIPEncoderLayer": _clip_layer,
}


def _fits(network: torch.nn.Module, fold: Fold) -> bool:
    """Whether both ends are plain layers with tensors to put a scale into."""
    import torch

    modules = dict(network.named_modules())
    producer = modules.get(fold.producer)
    if getattr(producer, "weight", None) is None:
        return False
    if not isinstance(producer, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.GroupNorm):
        return False
    return all(isinstance(modules.get(name), torch.nn.Linear) for name in fold.consumers)


def largest_inputs(
    network: torch.nn.Module,
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    layers: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Largest |x| of each input feature [in] of each linear layer over all calls.

    Raises StageError that names the layers where it is not finite.
    """
    import torch

    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].detach().abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.no_grad():
            for call in calls:
                module(*feeds_of(contract, call.feeds))
    finally:
        for handle in hooks:
            handle.remove()
    sick = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if sick:
        raise StageError(
            f"smooth_linear: {contract.component}",
            expected="finite inputs of every layer on the calibration calls",
            found=f"NaN or infinity in {', '.join(sick)}",
            remedy="the model itself is at fault there",
        )
    return found


def smooth(network: torch.nn.Module, folds: Sequence[Fold], largest: Mapping[str, Any],
           alpha: float) -> None:  # fmt: skip
    """Move the scales of all `folds`, in place."""
    import torch

    with torch.no_grad():
        for fold in folds:
            consumers: list[Any] = [network.get_submodule(name) for name in fold.consumers]
            weights = torch.stack([one.weight.abs().amax(0) for one in consumers]).amax(0)
            inputs = largest[fold.consumers[0]]
            scale = inputs**alpha / weights ** (1 - alpha)
            usable = (inputs > 0) & (weights > 0)
            scale = torch.where(usable, scale, torch.ones_like(scale)).clamp(_LEAST, _MOST)
            _divide_output(network.get_submodule(fold.producer), scale, fold.rows)
            for one in consumers:
                one.weight.data = one.weight.data * scale


def _divide_output(producer: Any, scale: torch.Tensor, rows: int | None) -> None:
    """The first `rows` outputs (all, of a norm) become 1 / scale of what they were."""
    for name in ("weight", "bias"):
        value = getattr(producer, name, None)
        if value is not None:
            changed = value.data.clone()
            part = slice(None) if rows is None else slice(rows)
            changed[part] /= scale.reshape(-1, *(1,) * (value.ndim - 1))
            value.data = changed
