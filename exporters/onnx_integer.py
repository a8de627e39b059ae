"""Writes a quantization plan in the operators that onnxruntime's CPU computes fastest.

linear   x ── Q ── MatMulIntegerToFloat ── y                     (bias and scales inside it)
conv     x ── Q ── to NHWC ── Pad ── patches ── MatMulIntegerToFloat ── to NCHW ── y
conv     x ── Q ── QLinearConv ── DQ ── y                        (where its output has a range)
dynamic  DynamicQuantizeLinear in the place of Q

Measured in docs/compression/int8-kernels.md: activations are uint8 (signed ones are ten times
slower in MatMulInteger), ConvInteger is four times slower than float32. Patches are the rows of
im2col: kernel height × kernel width × channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffoundry.exporters.onnx_layers import Layer, Writer
from diffoundry.exporters.onnx_qdq import QdqForm
from diffoundry.formats.quant_plan import Grid, QuantPlan, grid_of
from diffoundry.types import Array

if TYPE_CHECKING:
    import onnx_ir as ir

_MICROSOFT = "com.microsoft"
# A slice's end that means: to the last.
_LAST = 2**62


class IntegerForm:
    """One pass over a graph. Layers that read one value on one grid share what quantizes it."""

    def __init__(self, writer: Writer, plan: QuantPlan) -> None:
        self._writer, self._plan = writer, plan
        self._qdq = QdqForm(writer, plan)
        self._on_grid: dict[tuple[ir.Value, Grid | None], list[ir.Value]] = {}

    def write(self, layer: Layer) -> None:
        """Quantize one layer in place."""
        entry, node = layer.entry, layer.node
        if node.op_type == "Gather":
            self._embedding(layer)
        elif not entry.integer_kernel:
            self._qdq.write(layer)
        elif node.op_type != "Conv":
            self._linear(layer)
        elif entry.output is not None and entry.scheme == "static":
            self._conv_on_grid(layer)
        elif _has_patches(node):
            self._conv(layer)
        else:
            self._qdq.write(layer)

    def _embedding(self, layer: Layer) -> None:
        """Look up rows and their scales, not the whole table: it would be made float first."""
        module, node = layer.entry.module, layer.node
        stored, scale = layer.integers(self._plan)
        table = self._writer.constant(f"{module}.weight", stored)
        scales = self._writer.constant(f"{module}.weight_scale", scale[:, None])
        ids = node.inputs[1]
        (rows,) = self._writer.node(layer, "Gather", [table, ids], axis=0)
        (steps,) = self._writer.node(layer, "Gather", [scales, ids], axis=0)
        (real,) = self._writer.node(layer, "Cast", [rows], to=1)
        (scaled,) = self._writer.node(layer, "Mul", [real, steps])
        self._writer.replace(node, scaled, [node])

    def _linear(self, layer: Layer) -> None:
        stored, scale = layer.integers(self._plan)
        x = self._input(layer)
        product = self._product(layer, x[0], x, stored if layer.axis else stored.T, scale)
        self._writer.replace(layer.last, product, dict.fromkeys([layer.last, layer.node]))

    def _conv(self, layer: Layer) -> None:
        """As a product of patches: its output needs no grid, unlike QLinearConv's."""
        node = layer.node
        stored, scale = layer.integers(self._plan)
        x = self._input(layer)
        (rows,) = self._writer.node(layer, "Transpose", [x[0]], perm=[0, 2, 3, 1])
        patches = self._patches(layer, rows, x[2], stored.shape[2:])
        columns = stored.transpose(2, 3, 1, 0).reshape(-1, stored.shape[0])
        product = self._product(layer, patches, x, columns, scale)
        (planes,) = self._writer.node(layer, "Transpose", [product], perm=[0, 3, 1, 2])
        self._writer.replace(node, planes, [node])

    def _patches(
        self, layer: Layer, rows: ir.Value, zero: ir.Value, kernel: tuple[int, ...]
    ) -> ir.Value:
        """[batch, H, W, C] -> [batch, H', W', kernel height × kernel width × C]."""
        top, left, bottom, right = _integers(layer.node, "pads", [0, 0, 0, 0])
        if top or left or bottom or right:
            pads = self._shape([0, top, left, 0, 0, bottom, right, 0])
            (rows,) = self._writer.node(layer, "Pad", [rows, pads, zero])
        strides = _integers(layer.node, "strides", [1, 1])
        # Columns first: each pass copies every byte as often as that side of the kernel is long.
        for axis, size, stride in ((2, kernel[1], strides[1]), (1, kernel[0], strides[0])):
            if size == stride == 1:
                continue
            shifted = []
            for start in range(size):
                end = start + 1 - size
                bounds = [self._shape([n]) for n in (start, end or _LAST, axis, stride)]
                shifted += self._writer.node(layer, "Slice", [rows, *bounds])
            rows = shifted[0]
            if size > 1:
                (rows,) = self._writer.node(layer, "Concat", shifted, axis=3)
        return rows

    def _conv_on_grid(self, layer: Layer) -> None:
        import numpy as np

        entry, node = layer.entry, layer.node
        assert entry.output is not None and entry.activation is not None
        module, write = entry.module, self._writer
        stored, scale = layer.integers(self._plan)
        bias = layer.bias(self._plan)
        x = self._input(layer)
        out = grid_of(entry.output, entry.symmetric)
        y_scale, y_zero = self._qdq.grid(layer, "output", out, symmetric=False)
        inputs = [
            *x,
            write.constant(f"{module}.weight", stored),
            write.constant(f"{module}.weight_scale", scale),
            write.constant(f"zeros.int8.{scale.size}", np.zeros(scale.size, np.int8)),
            y_scale,
            y_zero,
        ]
        if bias is not None:
            step = grid_of(entry.activation, entry.symmetric).scale * scale.astype(np.float64)
            limits = np.iinfo(np.int32)
            steps = np.clip(np.rint(bias / step), limits.min, limits.max).astype(np.int32)
            inputs.append(write.constant(f"{module}.bias", steps))
        (found,) = write.node(layer, "QLinearConv", inputs, **_geometry(node))
        (real,) = write.node(layer, "DequantizeLinear", [found, y_scale, y_zero])
        write.replace(node, real, [node])

    def _product(
        self, layer: Layer, rows: ir.Value, x: list[ir.Value], columns: Array, scale: Array
    ) -> ir.Value:
        """rows [..., in] uint8 × columns [in, out] int8 -> float32 [..., out], bias added."""
        module, write, bias = layer.entry.module, self._writer, layer.bias(self._plan)
        inputs: list[ir.Value | None] = [
            rows,
            write.constant(f"{module}.weight", columns),
            x[1],
            write.constant(f"{module}.weight_scale", scale),
            x[2],
        ]
        if bias is not None:
            inputs += [None, write.constant(f"{module}.bias", bias)]
        (product,) = write.node(layer, "MatMulIntegerToFloat", inputs, domain=_MICROSOFT)
        return product

    def _input(self, layer: Layer) -> list[ir.Value]:
        """The layer's input as uint8, its scale, its zero point."""
        entry, source = layer.entry, layer.node.inputs[0]
        assert source is not None
        span = entry.activation if entry.scheme == "static" else None
        grid = grid_of(span, entry.symmetric) if span is not None else None
        if (source, grid) not in self._on_grid:
            if grid is None:
                parts = self._writer.node(layer, "DynamicQuantizeLinear", [source], outputs=3)
            else:
                scale, zero = self._qdq.grid(layer, "input", grid, symmetric=False)
                parts = [*self._writer.node(layer, "QuantizeLinear", [source, scale, zero]),
                         scale, zero]  # fmt: skip
            self._on_grid[source, grid] = parts
        return self._on_grid[source, grid]

    def _shape(self, sizes: list[int]) -> ir.Value:
        import numpy as np

        name = "sizes." + ".".join(map(str, sizes))
        return self._writer.constant(name, np.array(sizes, np.int64))


def _has_patches(node: ir.Node) -> bool:
    """Whether a convolution is a product of patches: 2-D, one group, no holes, pads given."""
    rank = node.inputs[1].shape.rank() if node.inputs[1] and node.inputs[1].shape else 0
    auto = node.attributes.get("auto_pad")
    group = node.attributes.get("group")
    return (
        rank == 4
        and (auto is None or auto.as_string() == "NOTSET")
        and (group is None or group.as_int() == 1)
        and set(_integers(node, "dilations", [1, 1])) == {1}
    )


def _integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else default


def _geometry(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
