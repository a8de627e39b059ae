"""Writes a quantization plan as Q/DQ: what OpenVINO, TensorRT and every reader of ONNX know.

x ── Conv ── y       x ── Q ── DQ ── Conv ── y          (and Q ── DQ behind y, where planned)
     W ┘                 Wint8 ── DQ ┘

No operator outside ONNX. onnxruntime runs most of it in float (see docs/compression).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffoundry.exporters.onnx_layers import Layer, Writer
from diffoundry.formats.quant_plan import Grid, QuantPlan, grid_of

if TYPE_CHECKING:
    import onnx_ir as ir


class QdqForm:
    """One pass over a graph. Layers that read one value on one grid share its Q and DQ."""

    def __init__(self, writer: Writer, plan: QuantPlan) -> None:
        self._writer, self._plan = writer, plan
        self._on_grid: dict[tuple[ir.Value, Grid | None, bool], ir.Value] = {}

    def write(self, layer: Layer) -> None:
        """Quantize one layer in place."""
        entry, node = layer.entry, layer.node
        node.replace_input_with(layer.place, self.weight(layer))
        self.correct_bias(layer)
        if entry.integer_kernel:
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, self._input(layer, source))
        if entry.output is not None:
            last = layer.last
            grid = grid_of(entry.output, entry.symmetric)
            # The same grid with signed numbers: OpenVINO multiplies two activations as integers
            # only where neither has a zero point.
            signed = entry.symmetric or grid.signed_zero_point == 0
            scale, zero = self.grid(layer, "output", grid, signed)
            value = last.outputs[0]
            (stored,) = self._writer.node(layer, "QuantizeLinear", [value, scale, zero], after=last)
            producer = stored.producer()
            (real,) = self._writer.node(
                layer, "DequantizeLinear", [stored, scale, zero], after=producer
            )
            self._writer.redirect(last, real, but=producer)

    def weight(self, layer: Layer) -> ir.Value:
        """The dequantized weight, as it lay in the graph."""
        module = layer.entry.module
        stored, scale = layer.integers(self._plan)
        weight = self._writer.constant(f"{module}.weight", stored)
        scales = self._writer.constant(f"{module}.weight_scale", scale)
        # No zero point: where layers of two schemes shared one, OpenVINO computed both in float.
        (real,) = self._writer.node(layer, "DequantizeLinear", [weight, scales], axis=layer.axis)
        return real

    def correct_bias(self, layer: Layer) -> None:
        """Write the bias anew where the plan has another one."""
        module = layer.entry.module
        if self._plan.bias(module) is None:
            return
        array = layer.bias(self._plan)
        assert array is not None
        bias = self._writer.constant(f"{module}.bias", array)
        if layer.add is not None:
            product = layer.node.outputs[0]
            place = next(i for i, value in enumerate(layer.add.inputs) if value is not product)
            layer.add.replace_input_with(place, bias)
        elif layer.node.op_type in ("Conv", "Gemm"):
            layer.node.resize_inputs(3)
            layer.node.replace_input_with(2, bias)
        else:
            node, product = layer.node, layer.node.outputs[0]
            (added,) = self._writer.node(layer, "Add", [product, bias], after=node)
            self._writer.redirect(node, added, but=added.producer())

    def grid(
        self, layer: Layer, what: str, grid: Grid, symmetric: bool
    ) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point: int8 where symmetric (what TensorRT takes), else uint8."""
        import numpy as np

        kind, zero = (np.int8, grid.signed_zero_point) if symmetric else (np.uint8, grid.zero_point)
        name = f"{layer.path}/{what}.scale"
        scale = self._writer.constant(name, np.array(grid.scale, np.float32))
        point = self._writer.constant(f"zero.{kind.__name__}.{zero}", np.array(zero, kind))
        return scale, point

    def _input(self, layer: Layer, source: ir.Value) -> ir.Value:
        entry = layer.entry
        span = entry.activation if entry.scheme == "static" else None
        grid = grid_of(span, entry.symmetric) if span is not None else None
        key = (source, grid, entry.symmetric and grid is not None)
        if key not in self._on_grid:
            if grid is None:
                parts = self._writer.node(layer, "DynamicQuantizeLinear", [source], outputs=3)
            else:
                scale, zero = self.grid(layer, "input", grid, entry.symmetric)
                parts = [*self._writer.node(layer, "QuantizeLinear", [source, scale, zero]),
                         scale, zero]  # fmt: skip
            (self._on_grid[key],) = self._writer.node(layer, "DequantizeLinear", parts)
        return self._on_grid[key]
