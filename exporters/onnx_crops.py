"""A convolution whose result is cropped is padded by that much less instead.

x ── Conv(pads 1 1 1 1) ── Slice[:, :, :-1] ── y        x ── Conv(pads 1 1 0 1) ── y

The same products without the edge that nobody reads, and one copy of a plane less. torch pads both
sides of a convolution alike; ONNX does not have to. It is `split_upsampling`'s other half: four
INT8 convolutions of 512 channels, cropped from 129 x 129 to 128 x 128, take OpenVINO 300 ms, and
170 ms where they make 128 x 128 (two threads; planes of odd width suit its kernels less).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffoundry.exporters.fusions.editing import constant, integers, read_once

if TYPE_CHECKING:
    import onnx_ir as ir

_TO_THE_END = 2**31
"""An `end` from here on means the last value: exporters write the largest number that there is."""


def crop_convolutions(model: ir.Model) -> int:
    """Rewrite `model` in place; how many Slices went."""
    count = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) == ("", "Conv"):
            while _crop(model.graph, node):
                count += 1
    return count


def _crop(graph: ir.Graph, conv: ir.Node) -> bool:
    """Take the Slice behind a convolution into its padding, where there is one."""
    import onnx_ir as ir

    whole = conv.outputs[0]
    if not read_once(whole):
        return False
    reader = whole.uses()[0].node
    if (reader.domain, reader.op_type) != ("", "Slice") or reader.inputs[0] is not whole:
        return False
    cropped = reader.outputs[0]
    pads = _pads_after(conv, reader)
    if pads is None or cropped.is_graph_output():
        return False
    conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
    whole.shape = cropped.shape
    for use in list(cropped.uses()):
        use.node.replace_input_with(use.idx, whole)
    graph.remove(reader, safe=True)
    return True


def _pads_after(conv: ir.Node, crop: ir.Node) -> list[int] | None:
    """The padding that leaves only what the Slice keeps; None where there is none such."""
    weight = conv.inputs[1]
    rank = len(weight.shape) - 2 if weight is not None and weight.shape is not None else 0
    pads = integers(conv, "pads", [0] * 2 * rank)
    auto = conv.attributes.get("auto_pad")
    if set(integers(conv, "strides", [1] * rank)) != {1} or (
        auto is not None and auto.as_string() != "NOTSET"
    ):
        return None
    given = [constant(value) for value in crop.inputs[1:]]
    if len(given) < 3 or any(array is None for array in given):
        return None
    starts, ends, axes, *steps = (
        [int(one) for one in array] for array in given if array is not None
    )
    if steps and set(steps[0]) != {1}:
        return None
    for start, end, axis in zip(starts, ends, axes, strict=True):
        place = axis - 2 if axis >= 0 else axis + rank
        if not 0 <= place < rank or start < 0 or 0 <= end < _TO_THE_END:
            return None
        pads[place] -= start
        pads[place + rank] += min(end, 0)
    return pads if min(pads) >= 0 else None
