"""Watches the inputs and outputs of layers on an exported graph: torch.fx's graph-mode (PT2E)
observers, placed by a Quantizer of our own.

Stock quantizers also annotate adds, means and integer inputs; this one touches exactly the layers
it is given, found by the qualified name in `nn_module_stack`. Imports torch at its top.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from diffoundry.compression.estimating import affordable
from diffoundry.compression.layers import Kind
from diffoundry.compression.ranges import Seen
from diffoundry.compression.statistics import feeds_of
from diffoundry.errors import StageError

if TYPE_CHECKING:
    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

_OPERATIONS = {torch.ops.aten.conv2d.default: "conv", torch.ops.aten.linear.default: "linear"}
_CHANNEL_AXIS: Mapping[str, int] = {"conv": 1, "linear": -1}


class Watch(ObserverBase):
    """Remembers what passes (see `Seen`) and hands it on unchanged."""

    def __init__(self, axis: int, means: bool, **_: Any) -> None:
        super().__init__(dtype=torch.int8)
        self.seen = Seen(axis, means)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(x.detach().numpy())
        return x

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("this observer feeds plans, which make their own grids")

    def convert(self, model: Any, observer_node: Any) -> None:
        raise NotImplementedError("this observer feeds plans, which make their own grids")


class LayerQuantizer(Quantizer):
    """Annotates the inputs of the layers named in `wanted`, and the outputs of those in `outputs`;
    `means`: of each channel too."""

    def __init__(
        self, wanted: Mapping[str, Kind], outputs: Collection[str], means: bool = True
    ) -> None:
        super().__init__()
        self.wanted = wanted
        self.outputs = outputs
        self.means = means
        self.nodes: dict[str, torch.fx.Node] = {}

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            kind = _OPERATIONS.get(node.target)
            name = module_of(node)
            if kind is None or name not in self.wanted:
                continue
            spec = _spec(_CHANNEL_AXIS[kind], self.means)
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map={node.args[0]: spec},
                output_qspec=spec if name in self.outputs else None,
                _annotated=True,
            )
            self.nodes[name] = node
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        """Nothing can be wrong with it."""


def _spec(axis: int, means: bool) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=Watch.with_args(axis=axis, means=means),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )


def module_of(node: torch.fx.Node) -> str:
    """Qualified name of the module whose forward made this node ("" where none is known)."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


@dataclass(frozen=True)
class Watching:
    """How much is looked at. `outputs`: of which layers too. `means`: of each channel, for bias
    correction. `most`: multiply-adds of all calls together, which spread over fewer where one
    costs much."""

    outputs: Collection[str] = ()
    means: bool = True
    most: float = math.inf


def watch_layers(
    program: torch.export.ExportedProgram,
    contract: Contract,
    calls: Sequence[Call],
    wanted: Mapping[str, Kind],
    how: Watching | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Seen], dict[str, Seen]]:
    """What the layers named in `wanted` (convolutions and linear layers) take and give in `calls`.

    Raises StageError that names every layer which the graph does not have.
    """
    how = how or Watching()
    quantizer = LayerQuantizer(wanted, how.outputs, how.means)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = prepare_pt2e(program.module(), quantizer)
        missing = [name for name in wanted if name not in quantizer.nodes]
        if missing:
            raise StageError(
                f"quantize_fx: {contract.component}",
                expected="an exported graph with every layer of the module",
                found=f"no node of {', '.join(missing)}",
                remedy="trace and quantize the same module",
            )
        for call in calls[:1]:
            graph(*feeds_of(contract, call.feeds))
        taken, given = _collected(graph, wanted, how.outputs)
        cost = multiply_adds(graph, wanted, taken)
        chosen = affordable(calls, cost, how.most)
        if len(chosen) < len(calls):
            say(f"{contract.component}: {len(chosen)} of {len(calls)} calls, as one costs "
                f"{cost / 1e9:.0f} G multiply-adds")  # fmt: skip
        for call in chosen[1:]:
            graph(*feeds_of(contract, call.feeds))
    return taken, given


def multiply_adds(
    graph: torch.fx.GraphModule, wanted: Mapping[str, Kind], taken: Mapping[str, Seen]
) -> float:
    """Multiply-adds of the wanted layers in the calls that `taken` has seen."""
    total = 0.0
    for node in graph.graph.nodes:
        kind, name = _OPERATIONS.get(node.target), module_of(node)
        if kind is None or name not in wanted:
            continue
        weight, strides = node.args[1].meta["val"], (1,)
        if kind == "conv" and len(node.args) > 3:
            strides = node.args[3]
        total += taken[name].count * weight.numel() / math.prod(strides)
    return total


def _collected(
    graph: torch.fx.GraphModule, wanted: Mapping[str, Kind], outputs: Collection[str]
) -> tuple[dict[str, Seen], dict[str, Seen]]:
    """What each layer's observers remember: they go on remembering there."""
    watches = dict(graph.named_modules())
    taken: dict[str, Seen] = {}
    given: dict[str, Seen] = {}
    for node in graph.graph.nodes:
        name = module_of(node)
        if node.target not in _OPERATIONS or name not in wanted:
            continue
        taken[name] = _seen(watches, node.args[0], node)
        if name in outputs:
            given[name] = _seen(watches, next(iter(node.users)), node)
    return taken, given


def _seen(watches: Mapping[str, Any], found: Any, node: torch.fx.Node) -> Seen:
    watch = watches.get(str(found.target)) if found.op == "call_module" else None
    if not isinstance(watch, Watch):
        raise StageError(f"quantize_fx: {node.name}", expected="an observer", found=str(found))
    return watch.seen
