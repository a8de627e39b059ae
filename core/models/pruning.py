"""Where units can be cut out of a network for good, and the cutting itself.

Only places where nothing outside notices: the inner channels of a feed-forward block, the heads
of an attention block, the channels between the two convolutions of a resnet block. A network on
the meta device is cut just like one with weights, which is how a pruned folder is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffoundry.errors import ModelError

if TYPE_CHECKING:
    import torch

SiteKind = Literal["feed_forward", "heads", "channels"]


@dataclass(frozen=True)
class Site:
    """One place to prune.

    `module` is the qualified name of the block, `units` how many it has, `width` how many input
    columns of the consumer a unit owns (a head's size; else 1). Units lie in `groups`
    consecutive groups, of which each has to keep equally many: a group norm stands between.
    `producers` are the layers whose outputs the units are, with how many times the units repeat
    in their rows (GEGLU: value and gate are 2), `consumer` the layer that reads them.
    """

    kind: SiteKind
    module: str
    units: int
    width: int
    groups: int
    producers: tuple[tuple[str, int], ...]
    consumer: str

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.module}"

    def parameters(self, network: torch.nn.Module) -> int:
        """Parameters that leave with one unit."""
        total = sum(
            repeats * self.width * _row_parameters(network.get_submodule(name))
            for name, repeats in self.producers
        )
        consumer: Any = network.get_submodule(self.consumer)
        total += self.width * consumer.weight[:, 0].numel()
        if self.kind == "channels":
            total += 2  # the norm's scale and shift
        return total

    def problem_with(self, kept: Sequence[int]) -> str | None:
        """Why these units cannot be what stays, or None."""
        if not kept:
            return f"{self.name}: nothing would be left of {self.units} units"
        if sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= self.units:
            return f"{self.name}: units must be rising numbers below {self.units}"
        per_group = self.units // self.groups
        counts = {sum(unit // per_group == group for unit in kept) for group in range(self.groups)}
        if len(counts) > 1:
            return (
                f"{self.name}: each of the norm's {self.groups} groups has to keep equally many "
                f"of its {per_group} channels"
            )
        return None


def _row_parameters(layer: Any) -> int:
    """Parameters that belong to one output of a linear layer or convolution."""
    return int(layer.weight[0].numel()) + int(layer.bias is not None)


def find_sites(network: torch.nn.Module) -> tuple[Site, ...]:
    """Every place in the network that can lose a unit, in the order of its modules."""
    found = []
    for name, module in network.named_modules():
        make = MAKERS.get(type(module).__name__)
        site = make(name, module) if make is not None else None
        if site is not None and site.units > site.groups:
            found.append(site)
    return tuple(found)


def _feed_forward(name: str, block: Any) -> Site | None:
    """diffusers' FeedForward: net.0.proj (value and gate for GEGLU) -> net.2."""
    activation, consumer = block.net[0], block.net[2]
    inner = int(consumer.in_features)
    rows = int(activation.proj.out_features)
    if rows % inner or rows // inner > 2:
        return None
    producers = ((f"{name}.net.0.proj", rows // inner),)
    return Site("feed_forward", name, inner, 1, 1, producers, f"{name}.net.2")


def _clip_mlp(name: str, block: Any) -> Site:
    producers = ((f"{name}.fc1", 1),)
    return Site("feed_forward", name, int(block.fc2.in_features), 1, 1, producers, f"{name}.fc2")


def _attention(name: str, block: Any) -> Site | None:
    """diffusers' Attention without norms of heads or further projections."""
    plain = (
        block.inner_dim == block.inner_kv_dim
        and not block.fused_projections
        and all(getattr(block, extra, None) is None for extra in ("norm_q", "norm_k"))
        and block.added_kv_proj_dim is None
        and hasattr(block.to_k, "weight")  # neither missing nor in two parts
    )
    if not plain:
        return None
    producers = tuple((f"{name}.{part}", 1) for part in ("to_q", "to_k", "to_v"))
    width = int(block.to_q.out_features) // int(block.heads)
    return Site("heads", name, int(block.heads), width, 1, producers, f"{name}.to_out.0")


def _clip_attention(name: str, block: Any) -> Site:
    producers = tuple((f"{name}.{part}", 1) for part in ("q_proj", "k_proj", "v_proj"))
    return Site("heads", name, int(block.num_heads), int(block.head_dim), 1, producers,
                f"{name}.out_proj")  # fmt: skip


def _resnet(name: str, block: Any) -> Site | None:
    """diffusers' ResnetBlock2D: conv1 (+ time) -> norm2 -> conv2."""
    embedding = getattr(block, "time_emb_proj", None)
    if type(block.norm2).__name__ != "GroupNorm":
        return None
    producers = [(f"{name}.conv1", 1)]
    channels = int(block.conv2.in_channels)
    if embedding is not None:
        rows = int(embedding.out_features)
        # "scale_shift" has two rows a channel; conv1's own rows stand once all the same.
        producers.append((f"{name}.time_emb_proj", rows // channels))
    return Site("channels", name, channels, 1, int(block.norm2.num_groups), tuple(producers),
                f"{name}.conv2")  # fmt: skip


MAKERS: Mapping[str, Callable[[str, Any], Site | None]] = {
    "FeedForward": _feed_forward,
    "CLIPMLP": _clip_mlp,
    "Attention": _attention,
    "CLIPAttention": _clip_attention,
    "ResnetBlock2D": _resnet,
}


def cut(network: torch.nn.Module, site: Site, kept: Sequence[int]) -> None:
    """Leave only the `kept` units of `site`, in place: the tensors become smaller.

    Raises ModelError where that would empty the place or unbalance a norm's groups.
    """
    problem = site.problem_with(kept)
    if problem is not None:
        raise ModelError("pruning", expected="units that can stay", found=problem)
    _select(network, site, kept)


def _select(network: torch.nn.Module, site: Site, kept: Sequence[int]) -> None:
    columns = columns_of(site, kept)
    rows_of_one = site.units * site.width
    for name, repeats in site.producers:
        layer: Any = network.get_submodule(name)
        rows = [part * rows_of_one + column for part in range(repeats) for column in columns]
        _replace(layer, "weight", 0, rows)
        _replace(layer, "bias", 0, rows)
        _resize(layer, ("out_features", "out_channels"), len(rows))
    consumer: Any = network.get_submodule(site.consumer)
    _replace(consumer, "weight", 1, columns)
    _resize(consumer, ("in_features", "in_channels"), len(columns))
    _adapt_block(network.get_submodule(site.module), site, columns, len(kept))


def permute(network: torch.nn.Module, site: Site, order: Sequence[int]) -> None:
    """Put the units of `site` in `order`, in place: the network stays the same function.

    Raises ModelError unless every unit stands in it once, and each in its norm's group.
    """
    per_group = site.units // site.groups
    stays = all(unit // per_group == place // per_group for place, unit in enumerate(order))
    if sorted(order) != list(range(site.units)) or not stays:
        raise ModelError(
            "pruning",
            expected=f"an order of {site.units} units in {site.groups} groups of {per_group}",
            found=f"{site.name}: {list(order)}",
        )
    _select(network, site, order)


def columns_of(site: Site, units: Sequence[int]) -> list[int]:
    """The consumer's input columns (features or channels) that belong to `units`."""
    return [unit * site.width + i for unit in units for i in range(site.width)]


def _replace(layer: Any, name: str, dimension: int, index: Sequence[int]) -> None:
    import torch

    old = getattr(layer, name, None)
    if old is None:
        return
    wanted = torch.tensor(index, device=old.device)
    value = old.detach().index_select(dimension, wanted)
    setattr(layer, name, torch.nn.Parameter(value, requires_grad=old.requires_grad))


def _resize(layer: Any, names: Sequence[str], size: int) -> None:
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, size)


def _adapt_block(block: Any, site: Site, columns: Sequence[int], left: int) -> None:
    """Sizes that a block keeps beside its layers."""
    if site.kind == "channels":
        _replace(block.norm2, "weight", 0, columns)
        _replace(block.norm2, "bias", 0, columns)
        block.norm2.num_channels = len(columns)
    elif site.kind == "heads" and hasattr(block, "num_heads"):
        block.num_heads = left
    elif site.kind == "heads":
        block.heads = block.sliceable_head_dim = left
        block.inner_dim = block.inner_kv_dim = len(columns)
