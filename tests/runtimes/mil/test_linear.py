"""Products, pooling, normalizations and resizing against torch and plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffoundry.runtimes.mil.linear import pads
from diffoundry.runtimes.mil.program import Function
from diffoundry.types import Array
from tests.runtimes.mil.mil_cases import Case, build_programs, check_case, rand

X = rand(2, 4, 7, 6)
LINE = rand(2, 4, 9)
VOLUME = rand(1, 2, 4, 5, 4)
WEIGHT, BIAS = rand(6, 4, 3, 2), rand(6)
GROUPED = rand(6, 2, 3, 3)
BACK = rand(4, 3, 3, 2)
Q, K, V = rand(2, 3, 5, 8), rand(2, 3, 7, 8), rand(2, 3, 7, 4)
MASK = rand(1, 1, 5, 7)
GAMMA, BETA, MEAN, VARIANCE = rand(4), rand(4), rand(4), np.abs(rand(4)) + 0.1
RAMP = np.array([[[0.0, 1.0], [2.0, 4.0]]], np.float32)


def t(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)


def conv(x: Array, weight: Array, around: tuple[int, ...], **options: Any) -> Array:
    """`around`: padding of the last dimension first, as torch has it."""
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    bias = t(options.pop("bias")) if "bias" in options else None
    return function(F.pad(t(x), around), t(weight), bias, **options).numpy()


def attention(query: Array, key: Array, value: Array, mask: Array | float) -> Array:
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def lerp_rows(x: Array, points: list[float]) -> Array:
    """Rows of [C, H, W] at fractional places."""
    found = [np.interp(points, np.arange(x.shape[1]), x[c, :, w])
             for c in range(x.shape[0]) for w in range(x.shape[2])]  # fmt: skip
    shape = x.shape[0], x.shape[2], len(points)
    return np.array(found, np.float32).reshape(shape).swapaxes(1, 2)


def lerp(x: Array, rows: list[float], columns: list[float]) -> Array:
    return lerp_rows(lerp_rows(x, rows).swapaxes(1, 2), columns).swapaxes(1, 2)


def layer_norm(x: Array, axes: tuple[int, ...], gamma: Array, beta: Array) -> Array:
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + 0.01) * gamma + beta


POOL = {"kernel_sizes": [3, 2], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 0, 0]}
CASES = {
    "linear": Case("linear", {"x": LINE}, {"weight": rand(3, 9), "bias": rand(3)}, tolerance=1e-5),
    "linear without bias": Case("linear", {"x": LINE}, {"weight": rand(3, 9)}, tolerance=1e-5),
    "matmul": Case("matmul", {"x": Q, "y": V[:, :, :5]}, {"transpose_x": True}, tolerance=1e-5),
    "matmul transposed": Case("matmul", {"x": Q, "y": K}, {"transpose_y": True}, tolerance=1e-5),
    "matmul of a vector": Case("matmul", {"x": rand(5), "y": rand(5, 3)}, tolerance=1e-5),
    "einsum": Case("einsum", {"values": [rand(2, 3, 1, 5), rand(2, 5, 4, 6)]},
                   {"equation": "nchw,nwhu->nchu"}, tolerance=1e-5),
    "attention": Case("scaled_dot_product_attention", {"query": Q, "key": K, "value": V},
                      {}, attention(Q, K, V, 0.0), "iOS18"),
    "attention with a mask": Case(
        "scaled_dot_product_attention", {"query": Q, "key": K, "value": V, "attn_mask": MASK},
        {}, attention(Q, K, V, MASK), "iOS18"),
    "attention with a boolean mask": Case(
        "scaled_dot_product_attention", {"query": Q, "key": K, "value": V, "attn_mask": MASK > -1},
        {}, attention(Q, K, V, np.where(MASK > -1, 0, -np.inf)), "iOS18"),
    "conv": Case("conv", {"x": X}, {"weight": WEIGHT, "bias": BIAS},
                 conv(X, WEIGHT, (0, 0), bias=BIAS), tolerance=1e-5),
    "conv custom": Case(
        "conv", {"x": X},
        {"weight": WEIGHT, "pad_type": "custom", "pad": [2, 1, 0, 3], "strides": [2, 1]},
        conv(X, WEIGHT, (0, 3, 2, 1), stride=(2, 1)), tolerance=1e-5),
    "conv same": Case("conv", {"x": X}, {"weight": WEIGHT, "pad_type": "same", "strides": [2, 1]},
                      conv(X, WEIGHT, (0, 1, 1, 1), stride=(2, 1)), tolerance=1e-5),
    "conv same_lower": Case(
        "conv", {"x": X}, {"weight": WEIGHT, "pad_type": "same_lower"},
        conv(X, WEIGHT, (1, 0, 1, 1)), tolerance=1e-5),
    "conv dilated in groups": Case(
        "conv", {"x": X}, {"weight": GROUPED, "dilations": [2, 1], "groups": 2},
        conv(X, GROUPED, (0, 0), dilation=(2, 1), groups=2), tolerance=1e-5),
    "conv of a line": Case("conv", {"x": LINE}, {"weight": rand(2, 4, 3)}, lambda x, weight:
                           conv(x, weight, (0, 0)), tolerance=1e-5),
    "conv of a volume": Case("conv", {"x": VOLUME}, {"weight": rand(2, 2, 2, 3, 1)}, lambda x,
                             weight: conv(x, weight, (0, 0)), tolerance=1e-5),
    "conv with weights that the program computes": Case(
        "conv", {"x": X, "weight": WEIGHT}, {}, conv(X, WEIGHT, (0, 0)), tolerance=1e-5),
    "conv_transpose": Case(
        "conv_transpose", {"x": X}, {"weight": BACK, "strides": [2, 3], "bias": rand(3)},
        lambda x, weight, strides, bias:
        F.conv_transpose2d(t(x), t(weight), t(bias), strides).numpy(), tolerance=1e-5),
    "conv_transpose custom": Case(
        "conv_transpose", {"x": X},
        {"weight": BACK, "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]},
        F.conv_transpose2d(t(X), t(BACK), None, 2, 1).numpy(), tolerance=1e-5),
    "conv_transpose to a shape": Case(
        "conv_transpose", {"x": X},
        {"weight": BACK, "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 0, 0],
         "bias": rand(3), "output_shape": [2, 3, 14, 13]},
        lambda x, weight, bias, **_: F.conv_transpose2d(
            t(x), t(weight), t(bias), 2, (1, 0), (1, 1)).numpy(), tolerance=1e-5),
    "conv_transpose same": Case(
        "conv_transpose", {"x": X}, {"weight": BACK, "strides": [2, 1], "pad_type": "same"},
        F.conv_transpose2d(t(X), t(BACK), None, (2, 1)).numpy()[:, :, :14, :6], tolerance=1e-5),
    "max_pool": Case("max_pool", {"x": X}, POOL,
                     F.max_pool2d(t(X), (3, 2), 2, (1, 0)).numpy()),
    "max_pool ceil": Case("max_pool", {"x": X}, {**POOL, "strides": [3, 4], "ceil_mode": True},
                          F.max_pool2d(t(X), (3, 2), (3, 4), (1, 0), 1, True).numpy()),
    **{
        f"avg_pool ceil={ceil} without padding={alone}": Case(
            "avg_pool", {"x": X},
            {**POOL, "strides": [3, 4], "ceil_mode": ceil, "exclude_padding_from_average": alone},
            F.avg_pool2d(t(X), (3, 2), (3, 4), (1, 0), ceil, not alone).numpy())
        for ceil in (False, True) for alone in (False, True)
    },
    "avg_pool same": Case(
        "avg_pool", {"x": X}, {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "same",
                               "exclude_padding_from_average": True},
        F.avg_pool2d(F.pad(t(X), (0, 1, 1, 1)), 3, 2).numpy()
        / F.avg_pool2d(F.pad(torch.ones(2, 4, 7, 6), (0, 1, 1, 1)), 3, 2).numpy()),
    "l2_pool": Case("l2_pool", {"x": X}, {"kernel_sizes": [2, 2], "pad_type": "valid"},
                    np.sqrt(4 * F.avg_pool2d(t(X * X), 2, 1).numpy())),
    "batch_norm": Case(
        "batch_norm", {"x": X},
        {"mean": MEAN, "variance": VARIANCE, "gamma": GAMMA, "beta": BETA, "epsilon": 0.01},
        F.batch_norm(t(X), t(MEAN), t(VARIANCE), t(GAMMA), t(BETA), eps=0.01).numpy(),
        tolerance=1e-5),
    "instance_norm": Case(
        "instance_norm", {"x": X}, {"gamma": GAMMA, "beta": BETA},
        F.instance_norm(t(X), weight=t(GAMMA), bias=t(BETA)).numpy(), tolerance=1e-5),
    "layer_norm": Case("layer_norm", {"x": X},
                       {"axes": [-1], "gamma": BIAS, "beta": -BIAS, "epsilon": 0.01},
                       layer_norm(X, (3,), BIAS, -BIAS), tolerance=1e-5),
    "layer_norm of the channels": Case(
        "layer_norm", {"x": X}, {"axes": [1], "gamma": GAMMA, "beta": BETA, "epsilon": 0.01},
        layer_norm(X, (1,), GAMMA[:, None, None], BETA[:, None, None]), tolerance=1e-5),
    "layer_norm of all": Case("layer_norm", {"x": X}, {"axes": [0, 1, 2, 3], "epsilon": 0.01},
                              layer_norm(X, (0, 1, 2, 3), 1.0, 0.0), tolerance=1e-5),
    "l2_norm": Case("l2_norm", {"x": X}, {"epsilon": 0.1}),
    "local_response_norm": Case(
        "local_response_norm", {"x": X}, {"size": 3, "alpha": 0.2, "beta": 0.5, "k": 2.0},
        X / np.sqrt(2 + 0.2 / 3 * (X * X + np.pad(X * X, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]
                                   + np.pad(X * X, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]))),
    "upsample_nearest_neighbor": Case(
        "upsample_nearest_neighbor", {"x": X}, {"scale_factor_height": 2, "scale_factor_width": 3},
        X.repeat(2, 2).repeat(3, 3)),
    "upsample_nearest_neighbor by a fraction": Case(
        "upsample_nearest_neighbor", {"x": X},
        {"scale_factor_height": 1.5, "scale_factor_width": 0.5},
        F.interpolate(t(X), scale_factor=(1.5, 0.5), mode="nearest").numpy()),
    "resize_nearest_neighbor": Case(
        "resize_nearest_neighbor", {"x": X}, {"target_size_height": 3, "target_size_width": 13},
        F.interpolate(t(X), size=(3, 13), mode="nearest").numpy()),
    **{
        f"upsample_bilinear corners={align}": Case(
            "upsample_bilinear", {"x": X},
            {"scale_factor_height": 2, "scale_factor_width": 3, "align_corners": align},
            F.interpolate(t(X), (14, 18), mode="bilinear", align_corners=align).numpy())
        for align in (False, True)
    },
    "upsample_bilinear from the corner": Case(
        "upsample_bilinear", {"x": RAMP},
        {"scale_factor_height": 1, "scale_factor_width": 2, "align_corners": False,
         "half_pixel_centers": False}, lerp(RAMP, [0, 1], [0, 0.5, 1, 1])),
    # The grid points are those that Core ML's documentation of resize_bilinear lists.
    **{
        f"resize_bilinear {mode}": Case(
            "resize_bilinear", {"x": RAMP},
            {"target_size_height": 5, "target_size_width": 6, "sampling_mode": mode},
            lerp(RAMP, rows, columns), tolerance=1e-5)
        for mode, rows, columns in (
            ("UNALIGN_CORNERS", [0, 0.1, 0.5, 0.9, 1], [0, 0, 1 / 3, 2 / 3, 1, 1]),
            ("STRICT_ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
            ("ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
            ("DEFAULT", [0, 0.4, 0.8, 1, 1], [0, 1 / 3, 2 / 3, 1, 1, 1]),
            ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9], [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12,
                                                           11 / 12]),
        )
    },
    "resize": Case("resize", {"x": X}, {"shape": [9, 14, 0], "resized_dims": np.uint32(2),
                                        "sampling_mode": "UNALIGN_CORNERS"},
                   F.interpolate(t(X), (14, 6), mode="bilinear").numpy()),
    "resize nearest": Case("resize", {"x": X}, {"shape": [3, 13], "resized_dims": np.uint32(2),
                                                "interpolation_mode": "NEAREST_NEIGHBOR"},
                           F.interpolate(t(X), size=(3, 13), mode="nearest").numpy()),
}  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    return build_programs(CASES, tmp_path_factory.mktemp("linear"))


@pytest.mark.parametrize("name", CASES)
def test_products_and_norms_follow_their_definition(
    name: str, programs: dict[str, Function]
) -> None:
    check_case(CASES[name], programs[name])


def test_same_padding_makes_as_many_outputs_as_strides_fit() -> None:
    assert pads("same", None, (7, 8, 5), (3, 2, 1), (2, 3, 2)) == [(1, 1), (0, 0), (0, 0)]
    assert pads("same", None, (8,), (3,), (2,)) == [(0, 1)]
    assert pads("same_lower", None, (8,), (3,), (2,)) == [(1, 0)]
