"""Fits a layer of a cut network to what the original computes, by least squares.

Better than to reproduce the layer's own former output: what reaches the layer has changed too,
and its output is added to a residual stream that others before it have damaged. The layer is
fitted so that the *stream* after it comes nearest to the original's (as channel pruning fits
against the original's feature maps, He et al., arXiv 1707.06168, there also for residual sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffoundry.compression.compensation import solve
from diffoundry.compression.statistics import (
    Moments,
    add_moments,
    batches_of,
    mean_moments,
    no_moments,
)
from diffoundry.models.pruning import Site

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract


@dataclass(frozen=True)
class Stream:
    """Where the sum that a site adds to can be seen: what `module` reads or gives, × `scale`."""

    module: str
    end: Literal["input", "output"]
    scale: float = 1.0


def stream_after(network: torch.nn.Module, site: Site) -> Stream:
    """The residual stream after `site`; the consumer's own output where none is known."""
    above, _, name = site.module.rpartition(".")
    parent: Any = network.get_submodule(above)
    kind = type(parent).__name__
    if site.kind == "channels":
        block: Any = network.get_submodule(site.module)
        return Stream(site.module, "output", float(block.output_scale_factor))
    following = {
        ("BasicTransformerBlock", "attn1"): ("norm2", "norm3"),
        ("BasicTransformerBlock", "attn2"): ("norm3",),
        ("CLIPEncoderLayer", "self_attn"): ("layer_norm2",),
    }.get((kind, name), ())
    for norm in following:
        if getattr(parent, norm, None) is not None:
            return Stream(f"{above}.{norm}", "input")
    if (kind, name) in {("BasicTransformerBlock", "ff"), ("CLIPEncoderLayer", "mlp")}:
        return Stream(above, "output")
    return Stream(site.consumer, "output")


class _Seen(Exception):
    """All that is wanted of a call has been seen: the rest of it need not run."""


def _run(
    module: torch.nn.Module,
    network: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    consumer: str,
    stream: Stream,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the consumer reads and gives, and the stream after it, for one batch."""
    import torch

    seen: dict[str, torch.Tensor] = {}

    def at_consumer(_: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
        seen["x"], seen["y"] = given[0], made
        if stream.module == consumer:
            seen["stream"] = made
            raise _Seen

    def at_stream(_: torch.nn.Module, given: Any, made: Any = None) -> None:
        value = given[0] if stream.end == "input" else made
        seen["stream"] = value[0] if isinstance(value, tuple) else value
        raise _Seen

    watched = network.get_submodule(stream.module)
    hooks = [network.get_submodule(consumer).register_forward_hook(at_consumer)]
    if stream.module != consumer and stream.end == "input":
        hooks.append(watched.register_forward_pre_hook(at_stream))
    elif stream.module != consumer:
        hooks.append(watched.register_forward_hook(at_stream))
    try:
        with torch.no_grad():
            module(*inputs)
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    # A norm that the block does not use: the consumer's own output will do.
    return seen["x"], seen["y"], seen.get("stream", seen["y"])


def moments_towards(
    original: tuple[torch.nn.Module, torch.nn.Module],
    cut: tuple[torch.nn.Module, torch.nn.Module],
    contract: Contract,
    calls: Sequence[Call],
    weights: Sequence[float],
    site: Site,
) -> Moments:
    """What the consumer of `site` reads in the cut component, and what it should give for it so
    that the stream is the original's. Both are a component and its network.

    Raises StageError where activations are not finite.
    """
    stream = stream_after(cut[1], site)
    layer: Any = cut[1].get_submodule(site.consumer)
    moments = no_moments(layer, with_target=True)
    for batch in batches_of(contract, calls, weights):
        *_, wanted = _run(*original, batch.inputs, site.consumer, stream)
        x, made, now = _run(*cut, batch.inputs, site.consumer, stream)
        missing = (wanted - now) * stream.scale
        target = made + missing.reshape(made.shape)
        add_moments(moments, site.consumer, layer, x, batch.weights, target)
    return mean_moments(site.consumer, moments)


def refit(
    module: torch.nn.Module,
    network: torch.nn.Module,
    original: tuple[torch.nn.Module, torch.nn.Module],
    contract: Contract,
    calls: Sequence[Call],
    weights: Sequence[float],
    site: Site,
    damping: float,
) -> None:
    """Give the consumer of `site` the weights that bring the stream nearest to the original's.

    `original` is the component before anything was cut, and its network. The moments of one
    layer are in memory. Raises StageError where activations are not finite.
    """
    moments = moments_towards(original, (module, network), contract, calls, weights, site)
    solve(network.get_submodule(site.consumer), moments, damping)
