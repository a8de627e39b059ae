"""An engine that lost or weakens an input is caught, also where the input's effect is small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from diffoundry.formats.recording import ComponentRecording
from diffoundry.parity.component import check_component
from diffoundry.types import ArtifactType, Limits
from tests.core.parity import fakes
from tests.core.parity.fakes import CONTRACT, FakeSession
from tests.core.parity.judging import drop, failed_levels, judge, lines


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


def test_the_two_engines_are_never_open_together(recording):
    """Each may hold gigabytes. The one that is checked is opened again for what is left."""
    live: list[str] = []
    most: list[int] = []

    class Counted(FakeSession):
        def close(self) -> None:
            live.remove(self.compute)
            super().close()

    def opening(compute: str, dtype: str) -> Callable[[], FakeSession]:
        def open_it() -> FakeSession:
            live.append(compute)
            most.append(len(live))
            return Counted(dtype=dtype, compute=compute)

        return open_it

    result = check_component(
        opening("fp16", "float16"),
        ArtifactType("onnx", "fp16"),
        CONTRACT,
        with_small_swap(recording),
        Limits(peak_factor=1e-5),
        opening("fp32", "float32"),
    )
    assert result.passed and any("proven on" in check.message for check in result.checks)
    assert live == [] and max(most) == 1 and len(most) == 3


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
