"""Activations, arithmetic and reductions against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffoundry.runtimes.mil.program import Function
from tests.runtimes.mil.mil_cases import Case, build_programs, check_case, rand

X = rand(2, 3, 4, 5)
Y = rand(2, 1, 4, 5)
POSITIVE = np.abs(X) + 0.3
SMALL = np.tanh(X) * 0.9
I = np.arange(-6, 6, dtype=np.int32).reshape(3, 4)  # noqa: E741 - integers
J = np.array([[3, -2, 5, 2]], dtype=np.int32)
P, Q = I > 0, I % 2 == 0
C = np.array([0.5, -1.5, 2.0], np.float32)
A, B = np.float32(0.3), np.float32(1.2)
HALVES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997], np.float32)
TIES = np.array([[2.0, 5.0, 5.0, -1.0], [0.0, 0.0, -3.0, 0.0]], np.float32)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


CASES = {
    **{
        op: Case(op, {"x": X})
        for op in ("abs", "ceil", "cos", "cosh", "exp", "exp2", "floor", "relu", "relu6", "sigmoid",
                   "sign", "sin", "sinh", "softplus", "softsign", "square", "tanh", "atan", "erf",
                   "round")
    },
    **{op: Case(op, {"x": SMALL}) for op in ("acos", "asin", "atanh", "tan")},
    **{
        op: Case(op, {"x": X}, {"alpha": A})
        for op in ("elu", "leaky_relu", "thresholded_relu", "threshold")
    },
    **{
        op: Case(op, {"x": X}, {"alpha": A, "beta": B})
        for op in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard", "clip")
    },
    **{
        op: Case(op, {"x": X, "y": Y})
        for op in ("add", "sub", "mul", "maximum", "minimum", "real_div", "equal", "not_equal",
                   "less", "less_equal", "greater", "greater_equal", "mod", "floor_div")
    },
    **{
        f"{op} of integers": Case(op, {"x": I, "y": J})
        for op in ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod", "equal", "less")
    },
    **{op: Case(op, {"x": P, "y": Q}) for op in ("logical_and", "logical_or", "logical_xor")},
    "round half to even": Case("round", {"x": HALVES}, expected=[-2, -2, 0, 0, 2, 2, 0]),
    "division of integers": Case(
        "real_div", {"x": I, "y": J}, expected=lambda x, y: np.trunc(x / y).astype(np.int32)
    ),
    "sqrt": Case("sqrt", {"x": POSITIVE}),
    "pow": Case("pow", {"x": POSITIVE, "y": Y}),
    "silu": Case("silu", {"x": X}, expected=lambda x: x / (1 + np.exp(-x))),
    "logical_not": Case("logical_not", {"x": P}, expected=~P),
    "inverse": Case("inverse", {"x": POSITIVE}, {"epsilon": np.float32(0.01)}),
    "log": Case("log", {"x": POSITIVE}, {"epsilon": np.float32(0.01)}),
    "rsqrt": Case("rsqrt", {"x": POSITIVE}, {"epsilon": np.float32(0.01)}),
    "log with its default": Case("log", {"x": POSITIVE}, expected=np.log(POSITIVE)),
    "gelu": Case("gelu", {"x": X}, expected=lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2)))),
    "gelu tanh": Case("gelu", {"x": X}, {"mode": "TANH_APPROXIMATION"}),
    "gelu sigmoid": Case("gelu", {"x": X}, {"mode": "SIGMOID_APPROXIMATION"}),
    "prelu": Case("prelu", {"x": X}, {"alpha": C}),
    "softplus_parametric": Case("softplus_parametric", {"x": X}, {"alpha": C, "beta": C}),
    "softmax": Case("softmax", {"x": X}),
    "softmax of the second axis": Case("softmax", {"x": X * 30}, {"axis": 1}),
    "select": Case("select", {"cond": P, "a": I, "b": I * 2}),
    "select broadcasts": Case("select", {"cond": P, "a": I, "b": J}, expected=np.where(P, I, J)),
    "cast to int": Case("cast", {"x": X * 3}, {"dtype": "int32"}, np.trunc(X * 3).astype("int32")),
    "cast to bool": Case("cast", {"x": I}, {"dtype": "bool"}, I != 0),
    "cast to fp16": Case("cast", {"x": X}, {"dtype": "fp16"}, X.astype(np.float16)),
    "cast to int8": Case("cast", {"x": I}, {"dtype": "int8"}, I.astype(np.int8)),
    "identity": Case("identity", {"x": X}),
    **{
        f"{op} {axes} {keep}": Case(op, {"x": POSITIVE}, {"axes": axes, "keep_dims": keep})
        for op in ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod",
                   "reduce_sum_square", "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum")
        for axes, keep in (([1, -1], True), ([2], False))
    },
    "reduce_log_sum_exp": Case("reduce_log_sum_exp", {"x": X * 50}, {"axes": [1]}),
    "reduce_sum of all": Case("reduce_sum", {"x": X}, tolerance=1e-5),
    "reduce_mean of integers": Case(
        "reduce_mean", {"x": I}, {"axes": [1]}, np.trunc(I.mean(1)).astype(np.int32)
    ),
    **{op: Case(op, {"x": X}, {"axis": 2}) for op in ("reduce_argmax", "reduce_argmin")},
    "cumsum": Case("cumsum", {"x": X}, {"axis": 1}),
    "cumsum reversed": Case("cumsum", {"x": X}, {"axis": 1, "reverse": True}),
    "cumsum exclusive": Case(
        "cumsum", {"x": I}, {"axis": 1, "exclusive": True}, np.cumsum(I, 1, dtype=np.int32) - I
    ),
    "argsort": Case("argsort", {"x": X}, {"axis": 1, "ascending": True}),
    "argsort descending, ties in order": Case(
        "argsort", {"x": TIES}, expected=np.array([[1, 2, 0, 3], [0, 1, 3, 2]], np.int32)
    ),
    "topk": Case("topk", {"x": X}, {"k": 2, "axis": 1}),
    "topk ascending": Case("topk", {"x": X}, {"k": 3, "axis": -1, "ascending": True}),
    "topk values": Case(
        "topk",
        {"x": X},
        {"k": 2, "return_indices": False},
        np.sort(X, -1)[..., ::-1][..., :2],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    return build_programs(CASES, tmp_path_factory.mktemp("elementwise"))


@pytest.mark.parametrize("name", CASES)
def test_elementwise_operations_follow_their_definition(
    name: str, programs: dict[str, Function]
) -> None:
    check_case(CASES[name], programs[name])


def test_softmax_of_a_row_that_is_masked_out_is_not_a_number() -> None:
    from diffoundry.runtimes.mil.activation import softmax

    assert torch.isnan(softmax(torch.full((1, 3), -math.inf))).all()
