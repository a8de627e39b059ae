"""How much memory each stage of a build is expected to hold, before anything runs.

A stage's process holds its libraries, some multiple of the component's weights, and some multiple
of the widest activation at the usual shape. Each stage class states its multiples as `memory`
(`types.Memory`), taken from measured peaks (docs/real-size.md) and rounded up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffoundry.discovery import stage_class
from diffoundry.formats.torch_module import read_headers
from diffoundry.models.components import HALVES
from diffoundry.models.pipeline import PipelineSource
from diffoundry.types import Contract, Memory

if TYPE_CHECKING:
    from diffoundry.planning.graph import Node

BYTES = 4  # everything is reckoned in float32


class Forecast:
    """Expected peaks of the stages of one build."""

    def __init__(self, source: PipelineSource, contracts: Mapping[str, Contract]) -> None:
        self._weights = {name: weights_bytes(source, name) for name in contracts}
        self._activations = {
            name: widest_activation_bytes(source, name, contract)
            for name, contract in contracts.items()
        }

    def peak_of(self, node: Node) -> int:
        """Bytes that the node's process is expected to hold at most; of a stage that sees the
        whole pipeline, with its largest component, since it holds one at a time."""
        memory = getattr(stage_class(node.stage)(**node.options), "memory", Memory())
        names = [node.component] if node.component else list(self._weights)
        return memory.libraries + max(
            int(memory.weights * self._weights[name] + memory.activations * self._activations[name])
            for name in names
        )


def weights_bytes(source: PipelineSource, component: str) -> int:
    """Bytes of a component's weights in float32, of its own half where a folder holds two."""
    headers = read_headers(source.components[component].folder)
    wanted = HALVES.get(component, "")
    return BYTES * sum(
        math.prod(header.shape) for name, header in headers.items() if re.match(wanted, name)
    )


def widest_activation_bytes(source: PipelineSource, component: str, contract: Contract) -> int:
    """Bytes of the largest tensor between two layers at the usual shape, in float32.

    Of a U-Net the first level's feed-forward (GEGLU makes eight times the channels), of an
    autoencoder the full picture at the second level's width, of a text encoder its feed-forward.
    """
    config: Mapping[str, Any] = source.components[component].config
    shape = contract.opt_shape()
    pixels = math.prod(shape.values())
    if component == "text_encoder":
        return int(BYTES * pixels * source.geometry.tokens * config.get("intermediate_size", 3072))
    names = ("block_out_channels", "decoder_block_out_channels")
    widths = next((config[name] for name in names if config.get(name)), (320,))
    if component == "unet":
        return int(BYTES * 8 * widths[0] * pixels // source.geometry.vae_factor**2)
    return int(BYTES * widths[min(1, len(widths) - 1)] * pixels)
