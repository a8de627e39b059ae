"""Keeps litert_torch's converter from merging layers that become INT8 with their neighbours.

It multiplies the scale of a norm before a linear layer, or of the softmax after it, into the
weights. Then they are not the plan's any more, and neither is the activation. A fence is a
maximum with a number that no value is below; the converter sees no further than that, and it is
taken out of the file again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from diffoundry.formats.tflite_editing import Graph

FENCE = -(2.0**127)
"""A float32 that differs from what masks of attention are made of (-inf, the smallest number)."""


def build(module: Any, layers: Collection[str]) -> None:
    """Put a fence before and behind each convolution and linear layer of `layers`, in place.

    `module`: torch.fx.GraphModule whose nodes know their layer (`nn_module_stack`).
    """
    import torch

    aten = torch.ops.aten
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in (aten.conv2d.default, aten.linear.default):
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if stack and stack[-1][0] in layers:
            source = node.args[0]
            with graph.inserting_before(node):
                before = graph.call_function(aten.clamp.default, (source, FENCE))
            before.meta = {**node.meta, "val": source.meta.get("val")}
            node.update_arg(0, before)
            with graph.inserting_after(node):
                behind = graph.call_function(aten.clamp.default, (node, FENCE))
            behind.meta = dict(node.meta)
            node.replace_all_uses_with(behind, lambda user, kept=behind: user is not kept)
    graph.lint()
    module.recompile()


def tear_down(graph: Graph) -> int:
    """Take the fences out of a file's graph; how many there were."""
    return graph.remove("MAXIMUM", FENCE)
