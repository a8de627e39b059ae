"""Runs single MIL operations through a saved package, and says what they should give."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffoundry.runtimes.mil import program as mil_program
from diffoundry.runtimes.mil.execute import Interpreter
from diffoundry.types import Array

RNG = np.random.default_rng(0)
_CASTED = ("bool", "int8", "uint8", "int16")


@dataclass(frozen=True)
class Case:
    """One operation: `live` arrays are the program's inputs, `fixed` are constants.

    `expected`: an array, a tuple of them, or a function of live and fixed that was written from
    the operation's definition; None: what coremltools itself computes for constants.
    """

    op: str
    live: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    expected: Any = None
    opset: str = "iOS17"
    tolerance: float = 2e-6


def rand(*shape: int) -> Array:
    """Reproducible normal values."""
    return RNG.standard_normal(shape).astype(np.float32)


def build_programs(cases: Mapping[str, Case], folder: Path) -> dict[str, mil_program.Function]:
    """Save one package per opset with every case, and read it back. Case's name -> its function."""
    found = {}
    for opset in sorted({case.opset for case in cases.values()}):
        ours = {name: case for name, case in cases.items() if case.opset == opset}
        path = folder / f"{opset}.mlpackage"
        save(lambda ours=ours: _emit_all(ours), _inputs(ours), path, opset)
        function = mil_program.load(path).functions[0]
        found |= {name: _pruned(function, f"c{i}") for i, name in enumerate(ours)}
    return found


def run_case(case: Case, function: mil_program.Function) -> list[Array]:
    """What the interpreter gives for the case."""
    number = function.name
    feeds = {}
    for key, value in case.live.items():
        for j, array in enumerate(value if isinstance(value, list) else [value]):
            name = f"{number}_{key}_{j}"
            plain = array.astype(np.int32) if str(array.dtype) in _CASTED else array
            feeds[name] = torch.from_numpy(plain)
    interpreter = Interpreter(function, "test")
    found = interpreter.run(feeds, function.outputs, 1)
    return [found[name].numpy() for name in function.outputs]


def expected_of(case: Case) -> list[Array]:
    """What the case should give."""
    expected = case.expected
    if callable(expected):
        expected = expected(**case.live, **case.fixed)
    if expected is None:
        expected = _by_coremltools(case)
    return [np.asarray(one) for one in (expected if isinstance(expected, tuple) else (expected,))]


def check_case(case: Case, function: mil_program.Function) -> None:
    """Compare shapes and values; integers and bools exactly."""
    found, expected = run_case(case, function), expected_of(case)
    assert len(found) == len(expected)
    for one, wanted in zip(found, expected, strict=True):
        assert one.shape == wanted.shape
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, wanted, rtol=case.tolerance, atol=case.tolerance)
        else:
            np.testing.assert_array_equal(one, wanted)


def save(
    emit: Callable[[], Any],
    inputs: Mapping[str, Array],
    path: Path,
    opset: str = "iOS17",
    keep_passes: bool = False,
    precision: str = "FLOAT32",
    **options: Any,
) -> Path:
    """Save the program that `emit` builds (it returns the outputs) as an .mlpackage.

    `inputs` has an array for each input: its shape and type count.
    """
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
    target = getattr(ct.target, opset)
    program = Program()
    holders = {
        name: Builder.placeholder(array.shape, kinds[str(array.dtype)])
        for name, array in inputs.items()
    }
    with Function(holders, opset_version=target) as function:
        outputs = emit()
        function.set_outputs(outputs if isinstance(outputs, list) else [outputs])
    program.add_function("main", function)
    if not keep_passes:
        options["pass_pipeline"] = ct.PassPipeline.EMPTY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
            **options,
        )
        model.save(str(path))
    return path


def _inputs(cases: Mapping[str, Case]) -> dict[str, Array]:
    found = {"some": np.zeros(1, np.float32)}
    for i, case in enumerate(cases.values()):
        for key, value in case.live.items():
            for j, array in enumerate(value if isinstance(value, list) else [value]):
                plain = array.astype(np.int32) if str(array.dtype) in _CASTED else array
                found[f"c{i}_{key}_{j}"] = plain
    return found


def _emit_all(cases: Mapping[str, Case]) -> Any:
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil.block import curr_block

    inputs = curr_block().inputs
    for i, case in enumerate(cases.values()):
        arguments = dict(case.fixed)
        for key, value in case.live.items():
            many = value if isinstance(value, list) else [value]
            given = [_as_stored(inputs[f"c{i}_{key}_{j}"], a) for j, a in enumerate(many)]
            arguments[key] = given if isinstance(value, list) else given[0]
        getattr(Builder, case.op)(**arguments, name=f"c{i}")
    return Builder.identity(x=inputs["some"], name="nothing")


def _as_stored(var: Any, array: Array) -> Any:
    from coremltools.converters.mil import Builder

    return Builder.cast(x=var, dtype=str(array.dtype)) if str(array.dtype) in _CASTED else var


def _pruned(function: mil_program.Function, name: str) -> mil_program.Function:
    """The function with what the operation called `name` needs, and no more."""
    makers = {output: op for op in function.operations for output, _ in op.outputs}
    outputs = tuple(o for o in makers if o == name or o.rpartition("_")[0] == name)
    wanted, needed = list(outputs), set()
    while wanted:
        op = makers.get(wanted.pop())
        if op is not None and op.outputs[0][0] not in needed:
            needed.add(op.outputs[0][0])
            wanted += [a for given in op.arguments.values() for a in given if isinstance(a, str)]
    operations = tuple(op for op in function.operations if op.outputs[0][0] in needed)
    return dataclasses.replace(function, name=name, outputs=outputs, operations=operations)


def _by_coremltools(case: Case) -> Any:
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function

    with Function({}, opset_version=getattr(ct.target, case.opset)):
        # A copy: the value inference of thresholded_relu writes into its argument.
        found = getattr(Builder, case.op)(**copy.deepcopy(dict(case.live)), **case.fixed)
        many = found if isinstance(found, (tuple, list)) else (found,)
        values = tuple(var.val for var in many)
    assert all(value is not None for value in values), f"{case.op} has no value inference"
    return values
