"""Every check passes a right engine and is shown to fail one that misbehaves in its own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from diffoundry.building.publishing import VariantOutcome
from diffoundry.errors import DeferredError, ExitCode, MissingToolError, ModelError
from diffoundry.formats.recording import ComponentRecording, Floor
from diffoundry.parity.component import CHECKS, check_component
from diffoundry.parity.engine import Engine
from diffoundry.types import Array, ArtifactType, CheckResult, Limits, ParityResult, ShapePolicy
from tests.core.parity import fakes
from tests.core.parity.fakes import CONTRACT, FakeSession

LEVELS = {level for level, _ in CHECKS}


@pytest.fixture
def recording() -> ComponentRecording:
    return fakes.make_recording()


def judge(
    recording: ComponentRecording,
    session: FakeSession,
    policy: ShapePolicy | None = None,
    precision: Any = "fp32",
    fp32: FakeSession | None = None,
    limits: Limits | None = None,
) -> ParityResult:
    return check_component(
        lambda: session,
        ArtifactType("onnx", precision, policy),
        CONTRACT,
        recording,
        limits or Limits(peak_factor=1e-5),
        (lambda: fp32) if fp32 else None,
    )


def lines(result: ParityResult, level: str, status: str = "failed") -> list[CheckResult]:
    return [c for c in result.checks if c.level == level and c.status == status]


def failed_levels(result: ParityResult) -> set[str]:
    return {check.level for check in result.checks if check.status == "failed"}


def drop(name: str) -> Any:
    """Recompute the outputs with one input held at its first recorded value."""
    kept: dict[str, Array] = {}

    def spoil(outputs: dict[str, Array], feeds: Mapping[str, Array]) -> dict[str, Array]:
        value = kept.setdefault(name, feeds[name])
        if value.shape != feeds[name].shape:
            return outputs
        return fakes.original({**feeds, name: value})

    return spoil


# -- a right engine -------------------------------------------------------------------------


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


# -- calls ----------------------------------------------------------------------------------


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


# -- nothing dropped ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [spec.name for spec in CONTRACT.inputs])
def test_a_dropped_input_fails_nothing_dropped(recording, name):
    result = judge(recording, FakeSession(spoil=drop(name)), limits=Limits(max_abs=100.0))
    assert failed_levels(result) == {"nothing_dropped"}
    (line,) = lines(result, "nothing_dropped")
    assert line.name == name
    assert line.values["norm_ratio"] < 0.01


def test_a_weakened_input_fails_by_the_size_of_the_change(recording):
    session = FakeSession(hooks={"guidance": lambda v: v * 0.9})
    result = judge(recording, session, limits=Limits(max_abs=100.0))
    line = next(c for c in lines(result, "nothing_dropped") if c.name == "timestep_cond")
    assert "size is 0.89" in line.message


def test_an_input_without_a_swap_fails(recording):
    kept = tuple(s for s in recording.swaps if s.input != "timestep_cond")
    result = judge(dataclasses.replace(recording, swaps=kept), FakeSession())
    (line,) = lines(result, "nothing_dropped")
    assert line.name == "timestep_cond" and "exchanges this input nowhere" in line.message


def test_no_influence_is_recorded_as_info(recording):
    quiet = [
        dataclasses.replace(s, status="no_influence") if s.input == "timestep_cond" else s
        for s in recording.swaps
    ]
    result = judge(dataclasses.replace(recording, swaps=tuple(quiet)), FakeSession())
    assert result.passed
    (line,) = lines(result, "nothing_dropped", "info")
    assert line.name == "timestep_cond"


def with_small_swap(recording: ComponentRecording) -> ComponentRecording:
    """The guidance swap's effect lies between the fp32 and the fp16 limit."""
    base = recording.calls[0]
    value = base.feeds["timestep_cond"] + np.float32(1e-3)
    small = fakes.make_swap(base, "timestep_cond", value)
    others = tuple(s for s in recording.swaps if s.input != "timestep_cond")
    return dataclasses.replace(recording, swaps=(*others, small))


def test_an_effect_below_the_fp16_floor_is_proven_on_the_fp32_engine(recording):
    session = FakeSession(dtype="float16", compute="fp16")
    result = judge(with_small_swap(recording), session, precision="fp16", fp32=FakeSession())
    assert result.passed
    line = next(c for c in result.checks if c.name == "timestep_cond")
    assert "proven on the fp32 engine" in line.message
    assert line.values["judged_at"] == "fp32"


def test_an_effect_below_the_fp16_floor_without_an_fp32_engine_is_not_a_pass(recording):
    session = FakeSession(dtype="float16", compute="fp16")
    (line,) = lines(judge(with_small_swap(recording), session, precision="fp16"), "nothing_dropped")
    assert "no fp32 engine" in line.message


def test_verify_says_what_only_the_build_could_prove(recording):
    session = FakeSession(dtype="float16", compute="fp16")
    result = check_component(
        lambda: session,
        ArtifactType("onnx", "fp16"),
        CONTRACT,
        with_small_swap(recording),
        Limits(peak_factor=1e-5),
        proven_at_build=True,
    )
    line = next(c for c in result.checks if c.name == "timestep_cond")
    assert result.passed and line.status == "info" and "proven at build" in line.message


def test_the_fp32_engine_must_not_have_dropped_the_input_either(recording):
    session = FakeSession(dtype="float16", compute="fp16")
    broken = FakeSession(spoil=drop("timestep_cond"))
    result = judge(with_small_swap(recording), session, precision="fp16", fp32=broken)
    (line,) = lines(result, "nothing_dropped")
    assert "cosine" in line.message and "proven on" in line.message
    assert broken.closed


def test_an_enlarged_swap_is_used_where_the_real_one_is_too_small(recording):
    small = with_small_swap(recording)
    base = small.calls[0]
    wide = fakes.make_swap(base, "timestep_cond", np.full((1, 3), 3.0), "enlarged")
    both = dataclasses.replace(small, swaps=(*small.swaps, wide))
    session = FakeSession(dtype="float16", compute="fp16")
    result = judge(both, session, precision="fp16")
    line = next(c for c in result.checks if c.name == "timestep_cond")
    assert line.status == "passed" and line.values["swap"] == "enlarged"


def test_an_effect_below_the_fp32_floor_is_not_a_pass(recording):
    base = recording.calls[0]
    same = fakes.make_swap(base, "timestep_cond", base.feeds["timestep_cond"])
    swaps = (*(s for s in recording.swaps if s.input != "timestep_cond"), same)
    result = judge(dataclasses.replace(recording, swaps=swaps), FakeSession())
    assert "not proven" in lines(result, "nothing_dropped")[0].message


# -- shape range ----------------------------------------------------------------------------


def test_an_engine_wrong_only_at_the_untraced_shape_fails_shape_range(recording):
    def spoil(out, feeds):
        height, width = feeds["sample"].shape[2:]
        return {k: v * 0.5 if height != width else v for k, v in out.items()}

    result = judge(recording, FakeSession(spoil=spoil))
    assert failed_levels(result) == {"shape_range"}
    assert "untraced" in lines(result, "shape_range")[0].name


def test_a_wrong_output_shape_at_the_untraced_size_fails(recording):
    def spoil(out, feeds):
        height, width = feeds["sample"].shape[2:]
        return {k: v[..., :1] if height != width else v for k, v in out.items()}

    result = judge(recording, FakeSession(spoil=spoil))
    assert failed_levels(result) == {"shape_range", "sick_numbers"}


@pytest.mark.parametrize(
    ("removed", "words"),
    [(3, "never traced"), (2, "height=40"), (1, "width=16")],
)
def test_a_declared_shape_that_was_not_recorded_is_not_a_pass(recording, removed, words):
    kept = tuple(c for i, c in enumerate(recording.shape_calls) if i != removed)
    if removed == 1:
        kept = kept[:2]
    result = judge(dataclasses.replace(recording, shape_calls=kept), FakeSession())
    assert any(words in line.message for line in lines(result, "shape_range"))


def test_a_declared_shape_that_is_too_much_work_is_said_and_nothing_else_is_let_off(recording):
    kept = tuple(c for i, c in enumerate(recording.shape_calls) if i != 2)
    large = dict(recording.shape_calls[2].shape)
    assert large["height"] == 40
    left_out = dataclasses.replace(recording, shape_calls=kept, left_out=(large,))
    result = judge(left_out, FakeSession())
    unseen = lines(result, "shape_range", "info")
    assert "at height=40" in [line.name for line in unseen] and "large" in unseen[0].message
    assert all(line.values["not_visited"] for line in unseen) and result.passed
    published = VariantOutcome("onnx", ExitCode.DONE, (result,))
    assert "NOT checked" in published.line() and "height=40" in published.line()
    smaller = dataclasses.replace(left_out, left_out=({**large, "height": 24},))
    assert judge(smaller, FakeSession()).failed


def test_a_swap_may_start_from_a_call_at_another_shape(recording):
    small = recording.shape_calls[0]
    moved = tuple(
        fakes.make_swap(small, spec.name, np.asarray(small.feeds[spec.name]) * 3 + 1)
        for spec in recording.contract.inputs
    )
    moved = tuple(dataclasses.replace(swap, base=len(recording.calls)) for swap in moved)
    at_shape = dataclasses.replace(recording, swaps=moved)
    assert judge(at_shape, FakeSession()).passed
    broken = FakeSession(spoil=drop("timestep_cond"))
    assert "nothing_dropped" in failed_levels(judge(at_shape, broken))


FIXED = ShapePolicy("fixed", (fakes.pairs(fakes.USUAL),))


def test_a_fixed_engine_passes_and_refuses_the_other_shapes(recording):
    result = judge(recording, FakeSession(policy=FIXED), FIXED)
    assert result.passed
    refusals = [c for c in result.checks if c.name.startswith("refuses")]
    assert len(refusals) == 3


def test_a_fixed_engine_that_takes_another_shape_fails(recording):
    result = judge(recording, FakeSession(), FIXED)
    assert "ran at a shape that was not declared" in lines(result, "shape_range")[0].message


def test_a_fixed_engine_that_breaks_instead_of_refusing_fails(recording):
    def spoil(out, feeds):
        if feeds["sample"].shape[2] != 6:
            raise RuntimeError("bad reshape")
        return out

    result = judge(recording, FakeSession(spoil=spoil), FIXED)
    assert "broke instead of refusing" in lines(result, "shape_range")[0].message


def test_a_refusal_is_tried_also_where_the_recording_has_only_declared_shapes(recording):
    only = dataclasses.replace(recording, shape_calls=recording.shape_calls[:1])
    assert judge(only, FakeSession(policy=FIXED), FIXED).passed
    assert failed_levels(judge(only, FakeSession(), FIXED)) == {"shape_range"}


def test_an_enumerated_shape_without_a_reference_is_not_a_pass(recording):
    other = {"batch": 1, "height": 40, "width": 16}
    policy = ShapePolicy("enumerated", (fakes.pairs(fakes.USUAL), fakes.pairs(other)))
    result = judge(recording, FakeSession(policy=policy), policy)
    assert "height=40 width=16" in lines(result, "shape_range")[0].message


# -- sick numbers ---------------------------------------------------------------------------


def to_nan(value: Array) -> Array:
    spoiled = value.copy()
    spoiled.flat[0] = np.nan
    return spoiled


def test_the_first_node_that_gives_nan_is_named_and_proposed_for_fp32(recording):
    session = FakeSession(hooks={"hidden": to_nan}, dtype="float16", compute="fp16")
    (line,) = lines(judge(recording, session, precision="fp16"), "sick_numbers")
    assert line.values["first_bad_node"] == "hidden"
    assert line.values["keep_fp32"] == ["hidden"]
    assert "keep it in fp32" in line.message


def test_a_format_that_cannot_be_probed_says_so(recording):
    session = FakeSession(hooks={"hidden": to_nan}, can_probe=False)
    (line,) = lines(judge(recording, session), "sick_numbers")
    assert "no node can be named" in line.message


def test_an_infinity_that_healthy_calls_hold_too_is_innocent(recording):
    """An attention mask of -inf comes before the node that really breaks."""
    limit = recording.calls[1].feeds["timestep"][0] - 1

    class Masked(FakeSession):
        def probe(self, feeds, names=None):
            mask = {"mask": np.array([0.0, -np.inf], np.float32)}
            return {**mask, **fakes.nodes_of(feeds, self._hooks(feeds))}

        def infer(self, feeds):
            self.hooks = self._hooks(feeds)
            return super().infer(feeds)

        def _hooks(self, feeds):
            return {"active": to_nan} if feeds["timestep"][0] > limit else {}

    (line,) = lines(judge(recording, Masked()), "sick_numbers")
    assert line.values["first_bad_node"] == "active"
    assert "keep_fp32" not in line.values  # it is fp32 already


def test_nan_in_one_output_value_fails_the_call_check_with_finite_figures(recording):
    (line,) = lines(judge(recording, FakeSession(hooks={"model_output": to_nan})), "call")
    assert line.measure is not None and line.measure.max_abs > 1e38
    assert np.isfinite(list(dataclasses.asdict(line.measure).values())).all()


def test_a_constant_output_fails_and_names_the_node(recording):
    session = FakeSession(hooks={"model_output": np.zeros_like})
    result = judge(recording, session, limits=Limits(max_abs=100.0))
    (line,) = lines(result, "sick_numbers")
    assert line.values["kind"] == "constant"
    assert line.values["first_bad_node"] == "model_output"


def test_a_saturated_output_fails(recording):
    session = FakeSession(hooks={"active": lambda v: np.clip(v, -0.1, 0.1)})
    session.spoil = lambda out, _: {k: np.clip(v, -0.3, 0.3) for k, v in out.items()}
    (line,) = lines(judge(recording, session, limits=Limits(max_abs=100.0)), "sick_numbers")
    assert line.values["kind"] == "saturated"


def test_a_reference_that_is_not_finite_is_the_models_fault(recording):
    call = recording.calls[0]
    spoiled = dataclasses.replace(call, outputs={k: to_nan(v) for k, v in call.outputs.items()})
    with pytest.raises(ModelError, match="at fault"):
        judge(dataclasses.replace(recording, calls=(spoiled,)), FakeSession())


# -- precision, opening ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "used", "passes"),
    [
        ("fp32", "fp32", True),
        ("fp32", ["float32"], True),
        ("fp32", "bf16", False),
        ("fp32", ["fp32", "tf32"], False),
        ("fp16", "fp32", True),
        ("fp16", "int8", False),
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


# -- other formats --------------------------------------------------------------------------


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
