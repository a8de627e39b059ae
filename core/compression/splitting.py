"""Which layers of a U-Net are better quantized in two parts, and writing layers in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from diffoundry.models.surgery import Operation


def skip_convolutions(network: torch.nn.Module) -> dict[str, int]:
    """Convolutions that read a skip concatenation as it is, and where the skip's channels begin.

    In the upward half of a U-Net each resnet block reads cat(hidden, skip); its `conv_shortcut`
    sees the two halves without a norm, each with its own range (Q-Diffusion, arXiv 2302.04304,
    section 3.2).
    """
    import torch

    found: dict[str, int] = {}
    unet: Any = network
    if not hasattr(unet, "up_blocks"):
        return found
    below = unet.mid_block if unet.mid_block is not None else unet.down_blocks[-1]
    hidden = int(below.resnets[-1].out_channels)
    for number, block in enumerate(unet.up_blocks):
        for inner, resnet in enumerate(block.resnets):
            layer = resnet.conv_shortcut
            if isinstance(layer, torch.nn.Conv2d) and hidden < int(layer.in_channels):
                found[f"up_blocks.{number}.resnets.{inner}.conv_shortcut"] = hidden
            hidden = int(resnet.out_channels)
    return found


def token_layers(network: torch.nn.Module) -> tuple[str, ...]:
    """Linear layers that read the text in cross-attention (keys and values)."""
    import torch

    found = []
    for name, block in network.named_modules():
        if getattr(block, "is_cross_attention", False):
            for part in ("to_k", "to_v"):
                if isinstance(getattr(block, part, None), torch.nn.Linear):
                    found.append(f"{name}.{part}")
    return tuple(found)


def write_split(
    folder: Path, source: Path, network: torch.nn.Module, made: Mapping[str, Operation]
) -> None:
    """Split the layers of `network` (loaded from `source`), each by its operation, and write it."""
    from diffoundry.models.rewriting import write_rewritten

    for operation in made.values():
        operation.resize(network)
    write_rewritten(folder, source, network, list(made), list(made.values()))
