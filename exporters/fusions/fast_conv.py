"""3×3 convolutions by bilinear algorithms (see `bilinear`): products of matrices, fewer of them.

    x ── Conv(3×3) ── y

    x ── Conv(read, a group per channel, stride = step) ── Reshape ── Transpose ──┐
                                                 filters [planes, out, in] ── MatMul
    y ── ConvTranspose(write, a group per channel) ── Reshape ── Transpose ───────┘

and where pixels are repeated first, the plane is read before it is enlarged:

    x ── Resize(nearest, 2×) ── Conv(3×3) ── y        the same, with the algorithm `UP`

The filters are transformed when the model is written: 1.8 (f2) or 4 (f4, up) times their size.
onnxruntime reads them straight from the file, where it makes a copy of a Conv's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffoundry.exporters.fusions.bilinear import F2, F4, UP, Bilinear
from diffoundry.exporters.fusions.editing import (
    Graph,
    constant,
    integers,
    maker,
    read_once,
)
from diffoundry.exporters.fusions.sizes import Sizes
from diffoundry.types import Array

if TYPE_CHECKING:
    import onnx_ir as ir

# Below, measured, moving data costs what products save (docs/fusions.md).
FEWEST_CHANNELS = 128
FEWEST_PIXELS_F4 = 32 * 32
FEWEST_PIXELS_F2 = 16 * 16
# What is read from a plane is up to four times as large: large planes go through in bands.
BAND_BYTES = 100_000_000


def apply(graph: Graph) -> int:
    """Rewrite each convolution that an algorithm makes faster at the usual shape."""
    count = 0
    for node in graph.nodes("Conv"):
        source, enlarged = _source(node)
        algorithm = choose(node, enlarged, graph.sizes)
        if algorithm is not None and source is not None:
            _Convolution(graph, node, source, algorithm).write()
            count += 1
    graph.clean()
    return count


def choose(node: ir.Node, enlarged: bool, sizes: Sizes) -> Bilinear | None:
    """The algorithm for a convolution, or None: it is no plain 3×3, or would not gain."""
    plane = sizes.usual(node.outputs[0].name)
    filters = _filters(node)
    if filters is None or plane is None or len(plane) != 4:
        return None
    pixels = plane[2] * plane[3]
    channels = min(filters[:2])
    if channels < FEWEST_CHANNELS:
        return None
    if enlarged:
        return UP
    if pixels >= FEWEST_PIXELS_F4:
        return F4
    return F2 if pixels >= FEWEST_PIXELS_F2 else None


def _filters(node: ir.Node) -> tuple[int, ...] | None:
    """[out, in, 3, 3] of a float convolution over every pixel of a plane padded by one."""
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    shape = tuple(int(size) for size in weight.const_value.shape.numpy())
    group, pads = node.attributes.get("group"), node.attributes.get("auto_pad")
    plain = (
        len(shape) == 4
        and shape[2:] == (3, 3)
        and integers(node, "pads", [0] * 4) == [1] * 4
        and integers(node, "strides", [1, 1]) == [1, 1]
        and integers(node, "dilations", [1, 1]) == [1, 1]
        and (group is None or group.as_int() == 1)
        and (pads is None or pads.as_string() == "NOTSET")
        and weight.const_value.dtype.name == "FLOAT"
    )
    return shape if plain else None


def _source(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """What is convolved, and whether its pixels are repeated twice each way first."""
    source = node.inputs[0]
    resize = maker(source, "Resize")
    if resize is None or source is None or not read_once(source):
        return source, False
    given = list(resize.inputs) + [None] * 2
    scales = constant(given[2])
    text = {name: resize.attributes[name].as_string() for name in
            ("mode", "nearest_mode", "coordinate_transformation_mode")
            if name in resize.attributes}  # fmt: skip
    doubles = (
        scales is not None
        and scales.tolist() == [1, 1, 2, 2]
        and text.get("mode", "nearest") == "nearest"
        and (text.get("coordinate_transformation_mode"), text.get("nearest_mode"))
        == ("asymmetric", "floor")
    )
    return (resize.inputs[0], True) if doubles else (source, False)


class _Convolution:
    """Writes the nodes of one convolution."""

    def __init__(self, graph: Graph, node: ir.Node, source: ir.Value, by: Bilinear) -> None:
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        self._graph, self._node, self._source, self._by = graph, node, source, by
        self._weight = weight
        self._out, self._taken = (int(size) for size in weight.const_value.shape.numpy()[:2])
        self._bias = node.inputs[2] if len(node.inputs) > 2 else None

    def write(self) -> None:
        result, tile = self._node.outputs[0], self._by.tile
        bands = self._bands()
        made = self._banded(bands) if bands > 1 else self._tiled(self._source, 1, self._by.step)
        if not all(self._graph.sizes.multiple_of(result.name, axis, tile) for axis in (2, 3)):
            made = self._cropped(made)
        self._graph.replace(result, made, [self._node])

    def _bands(self) -> int:
        """How many bands of rows: as few as keep a band's products below BAND_BYTES."""
        name, sizes = self._node.outputs[0].name, self._graph.sizes
        plane, by = sizes.usual(name), self._by
        assert plane is not None
        tiles = plane[2] * plane[3] // by.tile**2
        size = 4 * by.planes * max(self._taken, self._out) * tiles
        fewest = sizes.smallest(name, 2) // by.tile
        return max(1, min(-(-size // BAND_BYTES), fewest))

    def _banded(self, bands: int) -> ir.Value:
        """Band by band, each with the rows above and below that its tiles read, then joined."""
        by, last = self._by, bands - 1
        height = self._nodes("Shape", [self._source], start=2, end=3)
        more = self._nodes("Add", [height, self._numbers(by.step - 1)])
        tiles = self._nodes("Div", [more, self._numbers(by.step)])
        edges = [
            self._nodes("Mul", [self._nodes("Div", [self._nodes("Mul", [tiles, self._numbers(b)]),
                                                    self._numbers(bands)]),
                                self._numbers(by.step)])
            for b in range(1, bands)
        ]  # fmt: skip
        below = by.window - by.step - 1
        made = []
        for band in range(bands):
            start = self._numbers(0)
            if band:
                start = self._nodes("Sub", [edges[band - 1], self._numbers(1)])
            end = height
            if band < last:
                end = self._nodes("Add", [edges[band], self._numbers(below)])
            rows = self._nodes("Slice", [self._source, start, end, self._numbers(2)])
            made.append(self._tiled(rows, int(band == 0), by.step if band == last else 0))
        return self._nodes("Concat", made, axis=2)

    def _tiled(self, source: ir.Value, above: int, below: int) -> ir.Value:
        """What comes out, padded to whole tiles; `above`, `below`: rows that `source` lacks."""
        by, weight = self._by, self._weight
        read = self._repeated("read", self._taken, by.reading())
        tiles = self._nodes("Conv", [source, read], group=self._taken, strides=[by.step] * 2,
                            pads=[above, 1, below, by.step])  # fmt: skip
        split = self._nodes("Reshape", [tiles, self._numbers(0, self._taken, by.planes, -1)])
        planar = self._nodes("Transpose", [split], perm=[0, 2, 1, 3])
        tensor = weight.const_value
        assert tensor is not None
        filters = self._graph.weight(
            f"{weight.name}.{by.name}",
            (by.planes, self._out, self._taken),
            lambda: by.weights(tensor.numpy()),
        )
        products = self._nodes("MatMul", [filters, planar])
        gathered = self._nodes("Transpose", [products], perm=[0, 2, 1, 3])
        size = self._nodes("Shape", [tiles], start=2)
        full = self._nodes("Concat", [self._numbers(0, self._out * by.planes), size], axis=0)
        grid = self._nodes("Reshape", [gathered, full])
        write = self._repeated("write", self._out, by.writing())
        inputs = [grid, write, self._bias] if self._bias is not None else [grid, write]
        return self._nodes("ConvTranspose", inputs, group=self._out, strides=[by.tile] * 2)

    def _cropped(self, made: ir.Value) -> ir.Value:
        """Without the rows and columns of the last tiles that are beyond the plane."""
        ends = self._nodes("Shape", [self._source], start=2)
        if self._by is UP:
            ends = self._nodes("Mul", [ends, self._numbers(2, 2)])
        return self._nodes("Slice", [made, self._numbers(0, 0), ends, self._numbers(2, 3)])

    def _nodes(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        return self._graph.node(self._node, operator, inputs, **attributes)

    def _numbers(self, *numbers: int) -> ir.Value:
        import numpy as np

        name = "sizes." + ".".join(map(str, numbers))
        return self._graph.constant(name, np.array(numbers, np.int64))

    def _repeated(self, what: str, channels: int, one: Array) -> ir.Value:
        """The same small weight for every channel."""
        import numpy as np

        name, shape = f"{self._by.name}.{what}.{channels}", (channels * len(one), *one.shape[1:])
        return self._graph.weight(name, shape, lambda: np.tile(one, (channels, 1, 1, 1)))
