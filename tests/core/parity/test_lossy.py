"""Engines that are lossy on purpose: against the compressed original, the budget and the plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from diffoundry.formats.quant_plan import LayerPlan, Range
from diffoundry.formats.recording import ComponentRecording
from diffoundry.formats.simulation import Simulation
from diffoundry.parity.component import check_component
from diffoundry.types import Array, ArtifactType, CheckResult, Limits, ParityResult
from tests.core.parity import fakes
from tests.core.parity.fakes import CONTRACT, FakeSession

PLAN = (
    LayerPlan("network.conv", "conv", "static", activation=Range(-1, 1)),
    LayerPlan("network.linear", "linear", "weight_only"),
    LayerPlan("network.conv_out", "conv", "float"),
)
STORED = {"network.conv": "static", "network.linear": "weight_only"}
NOISE = 0.01
"""What the compression changes, as a share of the outputs."""


def noisy(outputs: dict[str, Array], share: float, seed: int = 0) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    return {
        name: (v * (1 + share * draw.standard_normal(v.shape))).astype(np.float32)
        for name, v in outputs.items()
    }


def simulate(recording: ComponentRecording) -> Simulation:
    return Simulation(
        "sha256:0",
        tuple(noisy(dict(call.outputs), NOISE) for call in recording.calls),
        tuple(noisy(dict(call.outputs), NOISE) for call in recording.shape_calls),
    )


@pytest.fixture
def recording() -> ComponentRecording:
    return fakes.make_recording()


def engine(share: float, seed: int = 0, **more: Any) -> FakeSession:
    """The original's network with noise of its own."""
    return FakeSession(spoil=lambda outputs, _: noisy(outputs, share, seed), **more)


def judge(recording: ComponentRecording, session: FakeSession, **more: Any) -> ParityResult:
    options: dict[str, Any] = {
        "simulation": simulate(recording),
        "drift_limits": Limits(sqnr_db=30),
        "planned": PLAN,
        "stored": STORED,
        "open_fp32": FakeSession,
        "precision": "int8",
        **more,
    }
    kind = ArtifactType("onnx", options.pop("precision"))
    return check_component(
        lambda: session, kind, CONTRACT, recording, Limits(peak_factor=1e-5), **options
    )


def lines(result: ParityResult, level: str) -> list[CheckResult]:
    return [check for check in result.checks if check.level == level]


def failed(result: ParityResult) -> set[str]:
    return {check.level for check in result.checks if check.status == "failed"}


def int8(share: float, seed: int = 7) -> FakeSession:
    compute = {"compute": "int8", "integer_layers": ["network.conv"]}
    return engine(share, seed, compute=compute)


def test_integer_kernels_may_round_their_own_way_but_not_lose_more(recording):
    """Noise of the same size and other values: value by value as far from the simulation as from
    the original, and right."""
    result = judge(recording, int8(NOISE))
    assert not failed(result), [c.message for c in result.checks]
    (call,) = lines(result, "call")
    assert call.measure is not None and call.limits is not None
    assert call.limits.sqnr_db == pytest.approx(call.values["simulation_sqnr_db"] - 1.0)
    assert call.measure.sqnr_db == pytest.approx(40, abs=2)


def test_layers_in_bfloat16_may_add_the_noise_of_their_rounding(recording):
    """As loud as the compression's, so 3 dB less than the simulation, whose layers are float32."""
    floors = {
        name: dataclasses.replace(floor, sqnr_db=40)
        for name, floor in recording.floors["fp16"].items()
    }
    recording = dataclasses.replace(recording, floors={**recording.floors, "bf16": floors})
    session = engine(1.41 * NOISE, compute={"kernels_by_type": {"i8": 1, "bf16": 1}})
    result = judge(recording, session, precision="int8_bf16")
    assert not failed(result), [c.message for c in result.checks]
    (call,) = lines(result, "call")
    assert call.limits is not None and call.limits.sqnr_db == pytest.approx(36, abs=0.5)
    assert "call" in failed(judge(recording, session)), "its rounding is no excuse of INT8 alone"
    louder = engine(1.7 * NOISE, compute={"kernels_by_type": {"i8": 1, "bf16": 1}})
    assert "call" in failed(judge(recording, louder, precision="int8_bf16"))


def test_an_engine_more_than_1_db_below_the_simulation_fails(recording):
    result = judge(recording, int8(1.3 * NOISE))
    assert {"call", "shape_range"} <= failed(result)
    assert "below the simulation's" in lines(result, "call")[0].message
    assert "drift" not in failed(result), "the budget is another matter"


def test_a_broken_budget_fails_although_the_conversion_is_right(recording):
    result = judge(recording, int8(NOISE), drift_limits=Limits(sqnr_db=50))
    assert failed(result) == {"drift"}
    (drift,) = lines(result, "drift")
    assert drift.measure is not None and drift.measure.sqnr_db == pytest.approx(40, abs=2)


def test_no_budget_is_no_pass(recording):
    assert failed(judge(recording, int8(NOISE), drift_limits=None)) == {"drift"}


def test_a_pruned_fp32_engine_is_held_to_the_pruned_original_not_to_the_whole_one(recording):
    simulation = simulate(recording)
    by_feeds = {
        id(call.feeds): outputs
        for calls, made in (
            (recording.calls, simulation.calls),
            (recording.shape_calls, simulation.shape_calls),
        )
        for call, outputs in zip(calls, made, strict=True)
    }
    kept = {k.tobytes() if hasattr(k, "tobytes") else k: v for k, v in by_feeds.items()}

    def pruned(outputs: dict[str, Array], feeds: Any) -> dict[str, Array]:
        for call in (*recording.calls, *recording.shape_calls):
            if all(np.array_equal(call.feeds[name], feeds[name]) for name in feeds):
                return dict(kept[id(call.feeds)])
        return noisy(outputs, NOISE)

    result = judge(recording, FakeSession(spoil=pruned), precision="fp32", simulation=simulation)
    assert not failed(result) - {"nothing_dropped"}, [c.message for c in result.checks]
    result = judge(recording, FakeSession(), precision="fp32", simulation=simulation)
    assert "call" in failed(result), "the original's own numbers are not the pruned one's"


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"network.conv": "static"}, "float in the file: network.linear"),
        ({**STORED, "network.conv_out": "static"}, "not planned: network.conv_out"),
        (None, "cannot be read back"),
    ],
)
def test_a_file_that_is_not_as_planned_fails(recording, stored, words):
    result = judge(recording, int8(NOISE), stored=stored)
    assert failed(result) == {"plan"}
    assert words in lines(result, "plan")[0].message


def test_layers_that_run_in_float_after_all_are_stated(recording):
    session = engine(NOISE, 7, compute={"compute": "int8", "integer_layers": []})
    result = judge(recording, session)
    kernels = lines(result, "plan")[1]
    assert kernels.status == "info" and "only 0 of 1 planned layers" in kernels.message
    assert "network.conv" in kernels.message


def test_an_int8_engine_without_a_plan_fails(recording):
    assert "plan" in failed(judge(recording, int8(NOISE), planned=None))


def test_a_dropped_input_shows_through_the_noise(recording):
    """The limits for changes are wider (0.9, 25 %), and an input without effect breaks them."""
    session = dataclasses.replace(
        int8(NOISE / 100), hooks={"guidance": lambda value: np.zeros_like(value)}
    )
    result = judge(recording, session)
    line = next(c for c in lines(result, "nothing_dropped") if c.name == "timestep_cond")
    assert line.status == "failed" or line.values["judged_at"] == "fp32"
    assert "call" in failed(result)


@pytest.mark.parametrize(("factor", "passes"), [(0.85, True), (0.6, False)])
def test_changes_of_a_lossy_engine_have_wider_limits(recording, factor, passes):
    session = FakeSession(
        hooks={"guidance": lambda v: v * factor},
        compute={"compute": "int8", "integer_layers": ["network.conv"]},
    )
    quiet = Simulation(
        "sha256:0",
        tuple(dict(call.outputs) for call in recording.calls),
        tuple(dict(call.outputs) for call in recording.shape_calls),
    )
    result = judge(recording, session, simulation=quiet)
    line = next(c for c in lines(result, "nothing_dropped") if c.name == "timestep_cond")
    assert (line.status == "passed") is passes
    assert line.values["norm_tolerance"] == 0.25
