"""Every declared shape is visited, refused where it was not declared, or said not to be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.building.publishing import VariantOutcome
from diffoundry.errors import ExitCode
from diffoundry.types import ShapePolicy
from tests.core.parity import fakes
from tests.core.parity.fakes import FakeSession
from tests.core.parity.judging import drop, failed_levels, judge, lines


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
