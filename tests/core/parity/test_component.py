"""Every check passes a right engine and is shown to fail one that misbehaves in its own way."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.errors import DeferredError, MissingToolError
from diffoundry.formats.recording import Floor
from diffoundry.parity.component import CHECKS, check_component
from diffoundry.parity.engine import Engine
from diffoundry.types import Array, ArtifactType, Limits
from tests.core.parity.fakes import CONTRACT, FakeSession
from tests.core.parity.judging import failed_levels, judge, lines

LEVELS = {level for level, _ in CHECKS}


# -- a right engine ----------------------------------------------------------------------------


def test_a_right_engine_passes_every_level_and_is_closed(recording):
    session = FakeSession()
    result = judge(recording, session)
    assert result.passed, [c for c in result.checks if c.status != "passed"]
    assert {check.level for check in result.checks} == LEVELS
    assert session.closed


def test_each_recorded_call_runs_once(recording):
    session = FakeSession()
    judge(recording, session)
    assert session.calls == len(recording.calls) + len(recording.swaps) + len(recording.shape_calls)


def test_a_right_fp16_engine_passes_by_the_fp16_floor_and_not_by_the_fp32_one(recording):
    session = FakeSession(dtype="float16", compute="fp16")
    assert judge(recording, session, precision="fp16").passed
    assert "call" in failed_levels(judge(recording, session, precision="fp32"))


# -- calls -------------------------------------------------------------------------------------


def test_an_error_of_a_thousandth_fails_the_call_check(recording):
    session = FakeSession(spoil=lambda out, _: {k: v + 1e-3 for k, v in out.items()})
    (line,) = lines(judge(recording, session), "call")
    assert line.measure is not None and line.measure.max_abs == pytest.approx(1e-3, rel=1e-2)
    assert "max_abs 0.001 is above" in line.message
    assert line.values["failed_calls"] == [0, 1]


def test_one_bad_call_among_good_ones_fails(recording):
    second = recording.calls[1].feeds["sample"]

    def spoil(out, feeds):
        same = feeds["sample"].shape == second.shape and (feeds["sample"] == second).all()
        return {k: v * 1.01 if same else v for k, v in out.items()}

    (line,) = lines(judge(recording, FakeSession(spoil=spoil)), "call")
    assert line.values["failed_calls"] == [1]
    assert line.values["worst_call"] == 1


def test_no_limits_prove_nothing(recording):
    result = judge(recording, FakeSession(), limits=Limits())
    assert "no limit is set" in lines(result, "call")[0].message


def test_an_empty_recording_is_not_a_pass(recording):
    empty = dataclasses.replace(recording, calls=(), swaps=(), shape_calls=())
    result = judge(empty, FakeSession())
    assert failed_levels(result) >= {"call", "nothing_dropped", "shape_range", "sick_numbers"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out, _: {}, "output 'model_output' is missing"),
        (lambda out, _: {k: v.astype(np.float64) for k, v in out.items()}, "is float64, not"),
        (lambda out, _: {k: v[:, :1] for k, v in out.items()}, "dimension 1 is 1, not 2"),
        (lambda out, _: {**out, "other": out["model_output"]}, "unknown output 'other'"),
    ],
    ids=["missing", "dtype", "shape", "unknown"],
)
def test_outputs_that_do_not_fit_the_contract_fail_without_central_checking(
    recording, spoil, words
):
    result = judge(recording, FakeSession(spoil=spoil))
    assert words in lines(result, "call")[0].message
    assert failed_levels(result) == LEVELS - {"precision"}


def test_an_engine_that_raises_in_the_middle_fails_with_its_message(recording):
    def spoil(out, feeds):
        if feeds["timestep"][0] == recording.calls[1].feeds["timestep"][0]:
            raise RuntimeError("kernel 7 crashed")
        return out

    result = judge(recording, FakeSession(spoil=spoil))
    assert "RuntimeError: kernel 7 crashed" in lines(result, "call")[0].message
    assert "kernel 7 crashed" in lines(result, "sick_numbers")[0].message


def test_a_reused_output_buffer_does_not_fool_the_checks(recording):
    buffers: dict[tuple[int, ...], Array] = {}

    def spoil(out, _):
        buffer = buffers.setdefault(out["model_output"].shape, out["model_output"].copy())
        buffer[...] = out["model_output"]
        return {"model_output": buffer}

    assert judge(recording, FakeSession(spoil=spoil)).passed


# -- precision, opening ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "used", "passes"),
    [
        ("fp32", "fp32", True),
        ("fp32", ["float32"], True),
        ("fp32", "bf16", False),
        ("fp32", ["fp32", "tf32"], False),
        ("fp16", "fp32", True),
        ("fp16", "int8", False),
        ("bf16", ["bf16", "fp32", "fp16"], True),
        ("bf16", ["bf16", "int8"], False),
        ("int8", ["int8", "bf16"], False),
        ("fp32", None, False),
        ("fp32", {"kernels_by_type": {"float": 9, "double": 1}, "tf32": "off"}, True),
        ("fp32", {"kernels_by_type": {"float": 9, "float16": 1}}, False),
        ("fp32", {"weights": ["torch.float32"], "tf32": "on"}, False),
        ("fp32", {"weights": ["torch.float32"], "tf32": "off"}, True),
    ],
)
def test_silently_lower_precision_fails(recording, asked, used, passes):
    result = judge(recording, FakeSession(compute=used), precision=asked)
    assert bool(lines(result, "precision", "passed")) is passes
    assert bool(lines(result, "precision", "failed")) is not passes


@pytest.mark.parametrize("asked", ["bf16", "int8_bf16"])
def test_bfloat16_that_this_processor_has_no_units_for_is_not_proven_here(recording, asked):
    result = judge(recording, FakeSession(compute=["fp32"]), precision=asked)
    (line,) = lines(result, "precision", "deferred")
    assert "no units for bf16" in line.message
    assert not result.passed


def test_an_engine_that_does_not_open_has_failed(recording):
    def broken() -> FakeSession:
        raise RuntimeError("corrupt file")

    result = check_component(broken, ArtifactType("onnx", "fp32"), CONTRACT, recording)
    assert result.failed and "corrupt file" in result.checks[0].message


def test_an_engine_that_this_host_cannot_open_is_deferred(recording):
    def absent() -> FakeSession:
        raise DeferredError("needs CUDA")

    result = check_component(absent, ArtifactType("onnx", "fp32"), CONTRACT, recording)
    assert [c.status for c in result.checks] == ["deferred"]
    assert not result.passed and not result.failed


def test_a_missing_tool_is_raised_not_recorded(recording):
    def absent() -> FakeSession:
        raise MissingToolError("onnxruntime")

    with pytest.raises(MissingToolError):
        check_component(absent, ArtifactType("onnx", "fp32"), CONTRACT, recording)


def test_a_check_that_crashes_fails_and_hides_no_other(recording):
    class Silent(FakeSession):
        def precision_used(self):
            raise KeyError("nothing to read")

    result = judge(recording, Silent())
    (line,) = [c for c in result.checks if c.status == "failed"]
    assert line.level == "precision" and "could not run" in line.message


def test_a_recording_without_the_floor_is_not_a_pass(recording):
    bare = dataclasses.replace(recording, floors={})
    assert failed_levels(judge(bare, FakeSession())) >= {"call", "nothing_dropped"}


# -- other formats -----------------------------------------------------------------------------


def engine_with(dtype: str) -> Engine:
    """An engine whose own contract takes timesteps as `dtype`."""
    inputs = tuple(
        dataclasses.replace(spec, dtype=dtype) if spec.name == "timestep" else spec
        for spec in CONTRACT.inputs
    )
    contract = dataclasses.replace(CONTRACT, inputs=inputs)

    class Own(FakeSession):
        def infer(self, feeds):
            contract.check_feeds(feeds)
            return super().infer({k: v.astype(np.float32) for k, v in feeds.items()})

    return Engine(Own(), contract)


def test_feeds_are_cast_to_the_engines_own_dtype(recording):
    feeds = recording.calls[0].feeds
    outputs = engine_with("float16").run(feeds).outputs
    assert outputs is not None
    assert np.allclose(outputs["model_output"], recording.calls[0].outputs["model_output"])


def test_a_cast_between_kinds_or_beyond_the_range_is_an_error(recording):
    assert "fit the engine's int32" in engine_with("int32").run(recording.calls[0].feeds).error
    whole = {**recording.calls[0].feeds, "timestep": np.array([2**40])}
    assert "fit the engine's int32" in engine_with("int32").run(whole).error
    whole["timestep"] = np.array([100])
    assert engine_with("int32").run(dict(whole)).error == ""


def test_a_shape_that_rounds_more_is_held_to_its_own_floor(recording):
    """Larger pictures round more; the floor of the usual shape would reject noise."""
    error = 2e-4
    session = FakeSession(spoil=lambda outputs, feeds: {k: v + error for k, v in outputs.items()})
    last = recording.shape_calls[-1]
    own = {"fp32": {name: Floor(error, error, error, 60.0) for name in last.outputs}}
    known = dataclasses.replace(last, floors=own)
    shapes = (*recording.shape_calls[:-1], known)
    result = judge(dataclasses.replace(recording, shape_calls=shapes), session)
    status = {c.name: c.status for c in result.checks if c.level == "shape_range"}
    assert list(status.values())[-1] == "passed"
    assert "failed" in list(status.values())[:-1]
