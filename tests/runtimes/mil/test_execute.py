"""The loop: fp16 as it is stored, memory, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffoundry.errors import ArtifactError
from diffoundry.runtimes.mil import program as mil_program
from diffoundry.runtimes.mil.execute import Interpreter, Values
from diffoundry.types import Array
from tests.runtimes.mil.mil_cases import rand, save


def opened(
    path: Path, emit: Callable[[Any, Any], Any], x: Array, opset: str = "iOS17", **options: Any
) -> Interpreter:
    """The program that `emit(mb, x)` builds, saved and read back."""

    def build() -> Any:
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil.block import curr_block

        return emit(Builder, curr_block().inputs["x"])

    save(build, {"x": x}, path / "p.mlpackage", opset, **options)
    return Interpreter(mil_program.load(path / "p.mlpackage").functions[0], "p")


def run(interpreter: Interpreter, x: Array) -> Array:
    (name,) = interpreter.function.outputs
    return interpreter.run({"x": torch.from_numpy(x)}, [name], 1)[name].numpy()


def test_every_value_is_rounded_to_the_type_the_program_states(tmp_path: Path) -> None:
    """2048 + 1 is 2048 in fp16, so that the sum must lose the one between two operations."""

    def emit(mb: Any, x: Any) -> Any:
        one, many = np.float16(1), np.float16(2048)
        return mb.sub(x=mb.add(x=mb.add(x=x, y=many), y=one), y=many, name="y")

    found = run(opened(tmp_path, emit, np.zeros(3, np.float16)), np.zeros(3, np.float16))
    assert found.dtype == np.float16 and found.tolist() == [0, 0, 0]


def test_what_fp16_cannot_hold_becomes_infinite(tmp_path: Path) -> None:
    def emit(mb: Any, x: Any) -> Any:
        square = mb.mul(x=x, y=x, name="square")
        return mb.real_div(x=square, y=np.float16(256), name="y")

    x = np.array([255.0, 256.0, -300.0], np.float16)
    found = run(opened(tmp_path, emit, x), x)
    assert math.isfinite(found[0]) and np.isinf(found[1:]).all()


def test_sums_are_accumulated_in_fp32(tmp_path: Path) -> None:
    """One by one in fp16 the sum would stop at 2048."""
    x = np.ones((1, 4096), np.float16)
    emit = lambda mb, x: mb.reduce_sum(x=x, axes=[1], name="y")  # noqa: E731
    assert run(opened(tmp_path, emit, x), x).tolist() == [4096.0]
    weight = np.ones((1, 4096), np.float16)
    emit = lambda mb, x: mb.linear(x=x, weight=weight, name="y")  # noqa: E731
    assert run(opened(tmp_path, emit, x), x).tolist() == [[4096.0]]


def test_a_value_is_freed_after_its_last_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emit(mb: Any, x: Any) -> Any:
        first, unused = mb.split(x=x, num_splits=2, axis=0)
        del unused
        for _ in range(12):
            first = mb.add(x=mb.relu(x=first), y=first)
        return mb.identity(x=first, name="y")

    alive: list[int] = []
    compute = Interpreter._compute

    def counting(self: Interpreter, step: Any, values: Values) -> list[torch.Tensor]:
        alive.append(len(values))
        return compute(self, step, values)

    monkeypatch.setattr(Interpreter, "_compute", counting)
    x = np.abs(rand(4, 2))
    found = run(opened(tmp_path, emit, x), x)
    np.testing.assert_allclose(found, x[:2] * 2.0**12)
    assert len(alive) == 26 and max(alive) == 3


def test_an_output_may_be_an_input_or_computed_early(tmp_path: Path) -> None:
    def emit(mb: Any, x: Any) -> Any:
        y = mb.relu(x=x, name="y")
        return [y, mb.exp(x=y, name="z")]

    x = rand(3)
    interpreter = opened(tmp_path, emit, x)
    found = interpreter.run({"x": torch.from_numpy(x)}, ["z", "y", "x"], 1)
    np.testing.assert_array_equal(found["y"].numpy(), np.maximum(x, 0))
    np.testing.assert_array_equal(found["x"].numpy(), x)
    assert interpreter.value_names() == ["y", "z"]


def test_compressed_weights_are_no_values_of_their_own(tmp_path: Path) -> None:
    def emit(mb: Any, x: Any) -> Any:
        weight = mb.constexpr_affine_dequantize(
            quantized_data=np.ones((2, 3), np.int8), zero_point=np.int8(0),
            scale=np.float32(0.5), axis=0, name="weight",
        )  # fmt: skip
        return mb.linear(x=x, weight=weight, name="y")

    x = rand(1, 3)
    interpreter = opened(tmp_path, emit, x)
    assert interpreter.value_names() == ["y"]
    np.testing.assert_allclose(run(interpreter, x), x.sum(1, keepdims=True).repeat(2, 1) / 2)


def test_unknown_operations_are_all_named_before_anything_runs(tmp_path: Path) -> None:
    def emit(mb: Any, x: Any) -> Any:
        for name in ("first", "second"):
            x = mb.add(x=x, y=mb.random_uniform(shape=[3], name=name))
        found = mb.cond(
            pred=True, _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: mb.abs(x=x), name="branch"
        )
        return mb.exp(x=found, name="y")

    with pytest.raises(ArtifactError) as raised:
        opened(tmp_path, emit, rand(3))
    assert raised.value.found == (
        "operation cond at branch; operation random_uniform at first, second"
    )


def test_an_opset_that_is_newer_than_the_definitions_is_refused(tmp_path: Path) -> None:
    interpreter = opened(tmp_path, lambda mb, x: mb.exp(x=x, name="y"), rand(3))
    newer = dataclasses.replace(interpreter.function, opset="CoreML99")
    with pytest.raises(ArtifactError, match="opset CoreML99"):
        Interpreter(newer, "p")


def test_a_shape_that_the_program_does_not_state_is_refused(tmp_path: Path) -> None:
    interpreter = opened(tmp_path, lambda mb, x: mb.exp(x=x, name="wrong"), rand(2, 3))
    with pytest.raises(ArtifactError, match=r"exp 'wrong'(?s:.)*\[2, 4\]"):
        run(interpreter, rand(2, 4))


def test_torchs_settings_are_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    interpreter = opened(tmp_path, lambda mb, x: mb.exp(x=x, name="y"), rand(3))
    torch.set_float32_matmul_precision("medium")
    try:
        run(interpreter, rand(3))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert torch.get_num_threads() == before[0]
