"""Operations that move elements, and those that find them by index, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffoundry.errors import ArtifactError
from diffoundry.runtimes.mil.program import Function
from diffoundry.types import Array
from tests.runtimes.mil.mil_cases import Case, build_programs, check_case, rand, run_case

X = rand(2, 3, 4, 5)
I = np.arange(24, dtype=np.int32).reshape(2, 3, 4)  # noqa: E741 - integers
WHERE = np.array([[2, 0], [1, 1]], np.int32)
NEGATIVE = np.array([[2, -3], [-1, 1]], np.int32)
PAIRS = np.array([[0, 2], [1, 1], [0, 0]], np.int32)
GRID = rand(1, 8, 2, 3)


def _depth_to_space(x: Array, block_size: int) -> Array:
    n, c, h, w = x.shape
    b, out = block_size, np.zeros((n, c // block_size**2, h * block_size, w * block_size), x.dtype)
    for k in range(c // b**2):
        for i in range(h * b):
            for j in range(w * b):
                source = (i % b * b + j % b) * (c // b**2) + k
                out[:, k, i, j] = x[:, source, i // b, j // b]
    return out


def _added(data: Array, at: tuple[Array, ...], updates: Array, mode: str) -> Array:
    found = data.copy()
    step = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
            "max": np.maximum, "min": np.minimum}.get(mode)  # fmt: skip
    if step is None:
        found[at] = updates
    else:
        step.at(found, at, updates)
    return found


def _slices(name: str, begin: list[int], end: list[int], wanted: Array, **more: list) -> Case:
    return Case("slice_by_index", {"x": I}, {"begin": begin, "end": end, **more}, wanted)


CASES = {
    "reshape": Case("reshape", {"x": X}, {"shape": [3, -1, 2]}),
    "reshape keeps": Case("reshape", {"x": X}, {"shape": [0, -1, 0, 5]}, X),
    "reshape keeps from the right": Case(
        "reshape", {"x": X[0, 0]}, {"shape": [1, 0, -1, 0]}, X[0, 0].reshape(1, 1, 4, 5)
    ),
    "reshape_like": Case(
        "reshape_like",
        {"x": X, "ref_tensors": [rand(6, 2), rand(9, 4, 5)]},
        {"begins": [0, 1], "ends": [1, 0], "end_masks": [False, True]},
        X.reshape(6, 4, 5),
    ),
    "flatten2d": Case("flatten2d", {"x": X}, {"axis": -1}, X.reshape(24, 5)),
    "expand_dims": Case("expand_dims", {"x": X[0, 0]}, {"axes": [0, -1, 2]}),
    "squeeze": Case("squeeze", {"x": X[:1, :, :, :1]}, {"axes": [-1]}),
    "squeeze all": Case("squeeze", {"x": X[:1, :, :, :1]}),
    "squeeze leaves what is wide": Case("squeeze", {"x": X[:1]}, {"axes": [0, 1]}, X[0]),
    "transpose": Case("transpose", {"x": X}, {"perm": [0, -1, 1, 2]}, X.transpose(0, 3, 1, 2)),
    "concat": Case("concat", {"values": [X, X[:, :1]]}, {"axis": 1}),
    "concat of one": Case("concat", {"values": [X]}, {"axis": -2}, X),
    "concat interleaved": Case(
        "concat",
        {"values": [I, -I]},
        {"axis": 1, "interleave": True},
        np.stack([I, -I], 2).reshape(2, 6, 4),
    ),
    "stack": Case("stack", {"values": [I, -I]}, {"axis": -1}, np.stack([I, -I], -1)),
    "split": Case("split", {"x": X}, {"num_splits": 2, "axis": 2}),
    "split by sizes": Case("split", {"x": X}, {"split_sizes": [1, 3, 1], "axis": -1}),
    "pad": Case("pad", {"x": X}, {"pad": [1, 0, 2, 3], "constant_val": np.float32(7)}),
    "pad reflect": Case("pad", {"x": X}, {"pad": [3, 1, 0, 2], "mode": "reflect"}),
    "pad replicate": Case("pad", {"x": X}, {"pad": [0, 1, 3, 1, 0, 2], "mode": "replicate"}),
    "tile": Case("tile", {"x": I}, {"reps": [2, 1, 3]}),
    "reverse": Case("reverse", {"x": I}, {"axes": [0, -1]}),
    "reverse all": Case("reverse", {"x": I}),
    "shape": Case("shape", {"x": X}),
    "fill": Case("fill", {}, {"shape": [2, 3], "value": np.float32(1.5)}),
    "fill from a shape": Case(
        "fill", {"shape": np.array([2, 3], np.int32)}, {"value": 4}, np.full((2, 3), 4, np.int32)
    ),
    "fill_like": Case("fill_like", {"ref_tensor": I}, {"value": 0.5}, np.full(I.shape, 0.5, "f4"),
                      opset="iOS16"),
    "range_1d": Case("range_1d", {}, {"start": 1.0, "end": 2.0, "step": 0.3}),
    "range_1d down": Case("range_1d", {}, {"start": 7, "end": -2, "step": -3}, np.array([7, 4, 1])),
    "band_part": Case("band_part", {"x": X}, {"lower": 1, "upper": 2}),
    "band_part above": Case("band_part", {"x": X}, {"lower": 0}),
    "one_hot": Case(
        "one_hot",
        {"indices": WHERE},
        {"one_hot_vector_size": 3, "on_value": 2.0, "off_value": -1.0},
        np.where(WHERE[..., None] == np.arange(3), 2, -1).astype(np.float32),
    ),
    "one_hot first": Case(
        "one_hot",
        {"indices": WHERE},
        {"one_hot_vector_size": 3, "axis": 0},
        (np.arange(3)[:, None, None] == WHERE).astype(np.int32),
    ),
    "depth_to_space": Case("depth_to_space", {"x": GRID}, {"block_size": 2}, _depth_to_space),
    "space_to_depth": Case(
        "space_to_depth", {"x": _depth_to_space(GRID, 2)}, {"block_size": 2}, GRID
    ),
    "pixel_shuffle": Case(
        "pixel_shuffle",
        {"x": GRID},
        {"upscale_factor": 2},
        GRID.reshape(1, 2, 2, 2, 2, 3).transpose(0, 1, 4, 2, 5, 3).reshape(1, 2, 4, 6),
    ),
    "pixel_unshuffle": Case(
        "pixel_unshuffle",
        {"x": X[:, :, :, :4]},
        {"downscale_factor": np.uint32(2)},
        X[:, :, :, :4].reshape(2, 3, 2, 2, 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 2),
    ),
    "sliding_windows": Case(
        "sliding_windows",
        {"x": I},
        {"axis": 2, "size": 3, "stride": 1},
        np.stack([I[:, :, 0:3], I[:, :, 1:4]], 2),
    ),
    "slice": _slices("", [0, 1, -3], [1, 3, -1], I[0:1, 1:3, -3:-1]),
    "slice with strides": _slices("", [0, 0, 0], [2, 3, 4], I[:, ::2, ::3], stride=[1, 2, 3]),
    "slice backwards": _slices("", [1, 2, 3], [0, 0, 1], I[1:0:-1, 2:0:-1, 3:1:-1],
                               stride=[-1, -1, -1]),
    "slice with masks": _slices("", [1, 1, 2], [1, 2, 0], I[:, 1:2, 2:],
                                begin_mask=[True, False, False], end_mask=[True, False, True]),
    "slice squeezes": _slices("", [-1, 0, 1], [0, 3, 2], I[-1, :, 1],
                              squeeze_mask=[True, False, True]),
    "slice_update": Case(
        "slice_update",
        {"x": I, "update": -I[:, 1:3, ::2]},
        {"begin": [0, 1, 0], "end": [2, 3, 4], "stride": [1, 1, 2]},
        np.where(np.isin(I, I[:, 1:3, ::2]), -I, I),
        opset="iOS18",
    ),
    "slice_by_size": Case("slice_by_size", {"x": I}, {"begin": [0, -2, 1], "size": [2, 1, -1]}),
    "gather": Case("gather", {"x": X, "indices": WHERE}, {"axis": 1}, X[:, WHERE]),
    "gather iOS16": Case("gather", {"x": X, "indices": NEGATIVE}, {"axis": 1}, X[:, NEGATIVE],
                         opset="iOS16"),
    "gather iOS15": Case("gather", {"x": X, "indices": NEGATIVE}, {"axis": -3}, X[:, NEGATIVE],
                         opset="iOS15"),
    "gather in batches": Case(
        "gather",
        {"x": X, "indices": WHERE},
        {"axis": 2, "batch_dims": 1},
        np.stack([x[:, w] for x, w in zip(X, WHERE, strict=True)]),
    ),
    "gather_along_axis": Case(
        "gather_along_axis",
        {"x": I[..., 0], "indices": WHERE},
        {"axis": 1},
        np.take_along_axis(I[..., 0], WHERE, 1),
    ),
    "gather_nd": Case("gather_nd", {"x": I, "indices": PAIRS}, {}, I[PAIRS[:, 0], PAIRS[:, 1]]),
    "gather_nd in batches": Case(
        "gather_nd",
        {"x": I, "indices": WHERE},
        {"batch_dims": 1},
        np.stack([I[0, 2, 0], I[1, 1, 1]]),
    ),
    **{
        f"scatter {mode}": Case(
            "scatter",
            {"data": X, "indices": np.array([2, 0], np.int32), "updates": 1 + np.abs(X[:, :2])},
            {"axis": 1, "mode": mode},
            _added(X, (slice(None), np.array([2, 0])), 1 + np.abs(X[:, :2]), mode),
        )
        for mode in ("update", "add", "sub", "mul", "div", "max", "min")
    },
    "scatter twice": Case(
        "scatter",
        {"data": X, "indices": np.array([1, 1], np.int32), "updates": X[:, :2]},
        {"axis": 1},
        _added(X, (slice(None), np.array([1, 1])), X[:, :2], "add"),
    ),
    "scatter_along_axis": Case(
        "scatter_along_axis",
        {"data": I[..., 0], "indices": WHERE, "updates": 100 * WHERE},
        {"axis": 1},
        _added(I[..., 0], (np.arange(2)[:, None], WHERE), 100 * WHERE, "add"),
    ),
    "scatter_nd": Case(
        "scatter_nd",
        {"data": I, "indices": PAIRS, "updates": I[0]},
        {"mode": "update"},
        _added(I, (PAIRS[:, 0], PAIRS[:, 1]), I[0], "update"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    return build_programs({**CASES, **OUT_OF_RANGE}, tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("name", CASES)
def test_moving_elements_follows_the_definition(name: str, programs: dict[str, Function]) -> None:
    check_case(CASES[name], programs[name])


OUT_OF_RANGE = {
    "negative": Case("gather", {"x": X, "indices": NEGATIVE}, {"axis": 1}),
    "too large": Case("gather", {"x": X, "indices": WHERE + 1}, {"axis": 1}, opset="iOS16"),
    "in a scatter": Case(
        "scatter",
        {"data": X, "indices": np.array([0, -1], np.int32), "updates": X[:, :2]},
        {"axis": 1},
    ),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_an_index_that_core_ml_leaves_undefined_is_refused(
    name: str, programs: dict[str, Function]
) -> None:
    with pytest.raises(ArtifactError, match=f"{OUT_OF_RANGE[name].op}(?s:.)*indices"):
        run_case(OUT_OF_RANGE[name], programs[name])


def test_non_zero_gives_one_row_for_each_element() -> None:
    from diffoundry.runtimes.mil.indexing import non_zero

    x = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert non_zero(x).tolist() == [[0, 1], [1, 0]]
