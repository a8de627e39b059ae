"""The InceptionV3 of FID: 2048 features a picture, from weights in a local file.

Architecture: Szegedy et al. 2015, "Rethinking the Inception Architecture", with what the network
of Heusel et al. 2017 (TensorFlow's graph of 2015-12-05) does differently: averages leave out the
padding, and the last block takes the maximum. Attributes carry the tensor names of the usual
PyTorch port of those weights. Import this module only where torch is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffoundry.quality.resizing import resize
from diffoundry.quality.weights import load_tensors
from diffoundry.types import Array

SIDE = 299
FEATURES = 2048
BATCH = 16
Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU. `pad` keeps the size (stride 1)."""

    def __init__(self, n: int, out: int, size: Size, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(n, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def halve(n: int, out: int) -> Conv:
    """3×3 with stride 2 and no padding."""
    return Conv(n, out, 3, 2, pad=False)


def pooled(x: Tensor) -> Tensor:
    """3×3 maximum with stride 2."""
    return functional.max_pool2d(x, 3, 2)


def averaged(x: Tensor) -> Tensor:
    """3×3 average of the same size; the padding does not count."""
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35×35: 1×1, 5×5 and twice 3×3 side by side."""

    def __init__(self, n: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(n, 64, 1)
        self.branch5x5_1 = Conv(n, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(n, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(n, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(averaged(x))], 1)


class BlockB(nn.Module):
    """35×35 -> 17×17."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.branch3x3 = halve(n, 384)
        self.branch3x3dbl_1 = Conv(n, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = halve(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, pooled(x)], 1)


class BlockC(nn.Module):
    """17×17: 7×7 as 1×7 and 7×1."""

    def __init__(self, n: int, c: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(n, 192, 1)
        self.branch7x7_1 = Conv(n, c, 1)
        self.branch7x7_2 = Conv(c, c, (1, 7))
        self.branch7x7_3 = Conv(c, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(n, c, 1)
        self.branch7x7dbl_2 = Conv(c, c, (7, 1))
        self.branch7x7dbl_3 = Conv(c, c, (1, 7))
        self.branch7x7dbl_4 = Conv(c, c, (7, 1))
        self.branch7x7dbl_5 = Conv(c, 192, (1, 7))
        self.branch_pool = Conv(n, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(averaged(x))], 1)


class BlockD(nn.Module):
    """17×17 -> 8×8."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(n, 192, 1)
        self.branch3x3_2 = halve(192, 320)
        self.branch7x7x3_1 = Conv(n, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = halve(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), pooled(x)], 1)


class BlockE(nn.Module):
    """8×8: 3×3 split into 1×3 and 3×1. `largest`: the pool takes the maximum."""

    def __init__(self, n: int, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = Conv(n, 320, 1)
        self.branch3x3_1 = Conv(n, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(n, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(n, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pool = functional.max_pool2d(x, 3, 1, 1) if self.largest else averaged(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
                 self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]  # fmt: skip
        return torch.cat([*parts, self.branch_pool(pool)], 1)


class Inception(nn.Module):
    """[n, 3, 299, 299] in -1..1 -> [n, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = halve(3, 32)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, largest=False)
        self.Mixed_7c = BlockE(2048, largest=True)

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = pooled(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def open_inception(path: Path) -> Inception:
    """The network with the file's weights, for evaluation. Raises ModelError.

    The classifier (`fc.*`) and the counters of the batch normalisation may be in the file or not.
    """
    with torch.device("meta"):
        network = Inception()
    wanted = {
        name: (tuple(tensor.shape), (name,))
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state = load_tensors(path, "InceptionV3 weights", wanted)
    network.load_state_dict(state, strict=False, assign=True)
    return network.eval().requires_grad_(False)


def features(network: Inception, pictures: Sequence[Array]) -> Array:
    """uint8 pictures of any size -> float32 [n, 2048]; each is first resized to 299×299."""
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), BATCH):
            part = [resize(p, SIDE, SIDE, rounded=False) for p in pictures[start : start + BATCH]]
            pixels = torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)
            found.append(network(pixels / 127.5 - 1).numpy())
    return np.concatenate(found)
