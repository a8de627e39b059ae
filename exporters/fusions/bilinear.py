"""Bilinear algorithms for 3×3 convolutions: fewer products, more additions.

Along one axis, with a window d of the plane and the three taps w:

    outputs = write @ ((taps @ w) * (read @ d))

In two dimensions each matrix is applied along both axes: a tile of outputs costs len(read)²
products instead of 9 an output. (S. Winograd, Arithmetic Complexity of Computations, 1980;
A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from diffoundry.types import Array

# Filters of so many output channels are transformed at a time, in float64.
_ROWS = 32


@dataclass(frozen=True)
class Bilinear:
    """`step`: how far the window moves on the plane that it reads. `points`: where polynomials
    are evaluated, besides infinity; none where the matrices are given."""

    name: str
    tile: int
    step: int
    points: tuple[float, ...] = ()

    @cached_property
    def products(self) -> int:
        """Products along one axis for `tile` outputs."""
        return len(self.matrices[0])

    @property
    def planes(self) -> int:
        """Products for tile × tile outputs: how many matrix products a convolution becomes."""
        return self.products**2

    @property
    def window(self) -> int:
        """How many elements of the plane a tile reads along one axis, the first at -1."""
        return int(self.matrices[0].shape[1])

    @cached_property
    def matrices(self) -> tuple[Array, Array, Array]:
        """read [products, window], taps [products, 3], write [tile, products], in float64."""
        return _polyphase() if not self.points else _toom_cook(self.points, self.tile)

    def reading(self) -> Array:
        """Window to products: [planes, 1, window, window] float32, a convolution's weight."""
        import numpy as np

        read = self.matrices[0]
        found = np.einsum("pi,qj->pqij", read, read).reshape(self.planes, 1, *read.shape[1:] * 2)
        return found.astype(np.float32)

    def writing(self) -> Array:
        """Products to tile: [planes, 1, tile, tile] float32, a transposed convolution's weight."""
        import numpy as np

        write = self.matrices[2]
        found = np.einsum("ip,jq->pqij", write, write)
        return found.reshape(self.planes, 1, self.tile, self.tile).astype(np.float32)

    def weights(self, filters: Array) -> Array:
        """Filters [out, in, 3, 3] to [planes, out, in] float32."""
        import numpy as np

        taps = self.matrices[1]
        both = np.einsum("pi,qj->pqij", taps, taps).reshape(self.planes, 9)
        found = np.empty((self.planes, *filters.shape[:2]), np.float32)
        for row in range(0, filters.shape[0], _ROWS):
            some = filters[row : row + _ROWS].astype(np.float64)
            found[:, row : row + _ROWS] = np.tensordot(both, some.reshape(*some.shape[:2], 9),
                                                       axes=([1], [2]))  # fmt: skip
        return found


F2 = Bilinear("f2", tile=2, step=2, points=(0.0, 1.0, -1.0))
"""4 products an output; rounding as in a direct convolution (1.5 times its error)."""

F4 = Bilinear("f4", tile=4, step=4, points=(0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)))
"""2.25 products an output, 4.5 times the rounding of a direct convolution. Of the points that were
tried ((0, ±1, ±2), (0, ±1, 1/2, -2), (0, ±3/4, ±3/2)…) these round least: the whole plane is
symmetric about 1 on a logarithmic scale."""

UP = Bilinear("up", tile=4, step=2)
"""A plane made twice as large by repeating pixels, and convolved: read before it is enlarged.

Even and odd outputs are convolutions of two taps (w0, w1 + w2) and (w0 + w1, w2), with three
products for two outputs each. 2.25 products an output; its coefficients are 0, 1 and -1."""


def _polyphase() -> tuple[Array, Array, Array]:
    import numpy as np

    read = [[1, -1, 0, 0], [0, 1, 0, 0], [0, 1, -1, 0], [0, 1, -1, 0], [0, 0, 1, 0], [0, 0, 1, -1]]
    taps = [[1, 0, 0], [1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 1]]
    write = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, -1, 0, 0, 0], [0, 0, 0, 0, 1, -1]]
    return (np.array(read, np.float64), np.array(taps, np.float64), np.array(write, np.float64))


def _toom_cook(points: tuple[float, ...], tile: int) -> tuple[Array, Array, Array]:
    """The transposed Toom-Cook algorithm over `points` and infinity."""
    import numpy as np

    count = tile + 2

    def powers(width: int) -> Array:
        finite = np.array([[point**power for power in range(width)] for point in points])
        return np.vstack([finite, [[0.0] * (width - 1) + [1.0]]])

    read = np.linalg.inv(powers(count)).T
    # Powers of two move between the matrices without rounding: what is read keeps its size.
    scale = 2.0 ** np.round(np.log2(np.abs(read).max(axis=1)))[:, None]
    return read / scale, powers(3) * scale, powers(tile).T
