"""NaN and infinities are found, and laid at the first node that makes them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.errors import ModelError
from diffoundry.types import Array, Limits
from tests.core.parity import fakes
from tests.core.parity.fakes import FakeSession
from tests.core.parity.judging import judge, lines


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
