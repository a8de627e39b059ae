"""What a build says of its compressed variants: baselines, stored verdicts, the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffoundry.artifacts.evidence import VariantEvidence, new_evidence, update_evidence
from diffoundry.artifacts.gain import VariantGain
from diffoundry.benching.gains import GainAnswer, GainOrder, Seconds
from diffoundry.building.publishing import VariantOutcome
from diffoundry.cli import gains
from diffoundry.cli.gains import (
    baseline_of,
    calls_of_a_picture,
    lines,
    refuse_idle_gate,
    with_gains,
)
from diffoundry.errors import DeferredError, ExitCode, UsageError
from diffoundry.formats.canonical import sha256_bytes
from diffoundry.parity.checks.planned import KERNELS, LEVEL as PLANNED
from diffoundry.planning.graph import Plan
from diffoundry.planning.planner import make_plan
from diffoundry.types import Artifact, ArtifactType, CheckResult, ParityResult

HALF = "onnx-cpu-fp16"
BOTH = """
schema = "diffoundry.profile/1.0"
name = "both"
include = ["onnx-cpu", "onnx-cpu-fp16"]
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The embedded model in fp16 alone."""
    return make_plan(None, HALF)


class Driver:
    """A finished run, as far as it is asked for artifacts."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def artifact(self, reference: str) -> Artifact:
        path = self.folder / reference.replace(":", "-")
        path.write_text(reference)
        digest = sha256_bytes(reference.encode())
        return Artifact(ArtifactType("onnx"), path, digest)


class Clock:
    """Times every pair at given seconds, and counts how often it is asked."""

    def __init__(self, engine: float, baseline: float = 1.0, problem: str = "") -> None:
        self.seconds = Seconds((engine,) * 3, (baseline,) * 3)
        self.problem = problem
        self.orders: list[GainOrder] = []

    def __call__(self, order: GainOrder) -> GainAnswer:
        self.orders.append(order)
        found = {} if self.problem else {p.component: self.seconds for p in order.pairs}
        return GainAnswer(found, self.problem)


Judge = Callable[..., VariantOutcome]


@pytest.fixture
def judge(plan: Plan, tmp_path: Path) -> Judge:
    """judge(clock, required) -> the outcome of the only variant; `judge.out` is the bundle."""
    (tmp_path / "store").mkdir()
    driver: Any = Driver(plan, tmp_path / "store")

    def call(
        clock: Clock, required: float | None = None, results: tuple[ParityResult, ...] = ()
    ) -> VariantOutcome:
        outcomes = (VariantOutcome(HALF, ExitCode.DONE, results),)
        out = tmp_path / "bundle"
        (found,) = with_gains(driver, outcomes, out, required, lambda line: None, clock)
        return found

    return call


def keep(out: Path, gain: VariantGain) -> None:
    """Evidence of an earlier build."""
    out.mkdir(exist_ok=True)
    variants = {HALF: VariantEvidence(gain=gain)}
    update_evidence(out, new_evidence(sha256_bytes(b"any"), variants))


def test_every_component_and_the_picture_get_a_verdict(judge: Judge) -> None:
    clock = Clock(2.0)
    found = judge(clock)
    assert found.published and found.gain is not None
    assert set(found.gain.components) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert found.gain.picture and found.gain.picture.speed == 0.5
    said = "\n".join(lines((found,)))
    assert f"{HALF} · unet: DOES NOT PAY 0.50 ×" in said, "a slower engine is never silent"
    assert f"{HALF} · a picture: DOES NOT PAY 0.50 ×" in said


@pytest.mark.parametrize(("executed", "words"), [(70, "ONLY 70 of 84"), (84, "84 of 84")])
def test_fewer_integer_kernels_than_planned_are_stated_in_the_verdict(
    judge: Judge, executed: int, words: str
) -> None:
    values = {"planned": 84, "executed": executed}
    check = CheckResult(PLANNED, KERNELS, "info", "unet", values=values)
    found = judge(Clock(0.5), results=(ParityResult("unet", (check,)),))
    said = lines((found,))
    unet = next(line for line in said if "· unet" in line)
    assert f", {words} planned layers in integer kernels" in unet
    assert not any("integer" in line for line in said if "· unet" not in line)


def test_the_fp32_engines_that_the_checks_had_are_the_baseline(plan: Plan) -> None:
    (variant,) = plan.variants
    baseline = baseline_of(plan, variant, {HALF})
    assert baseline.name == "the fp32 engines of the same route"
    for component, reference in baseline.engines.items():
        node, _, output = reference.partition(":")
        assert plan.nodes[node].outputs[output].precision == "fp32"
        assert plan.nodes[node].component == component


def test_an_fp32_variant_of_the_bundle_comes_first_and_only_where_it_passed(tmp_path: Path) -> None:
    (tmp_path / "both.toml").write_text(BOTH)
    plan = make_plan(None, str(tmp_path / "both.toml"))
    full, half = plan.variants
    names = {full.request.name, half.request.name}
    assert baseline_of(plan, half, names).name == full.request.name
    assert baseline_of(plan, half, {half.request.name}).name != full.request.name


def test_without_any_fp32_engine_pytorch_is_the_baseline(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (variant,) = plan.variants
    monkeypatch.setattr(gains, "_uncompressed", lambda plan, variant, component: None)
    baseline = baseline_of(plan, variant, {HALF})
    assert (baseline.name, baseline.runtime) == ("PyTorch eager", "torch_eager")
    assert baseline.engines["unet"] == "source:unet"


def test_a_gain_below_the_required_one_is_not_published_and_says_why(judge: Judge) -> None:
    found = judge(Clock(1.0, 1.1), 1.2)
    assert not found.published and found.exit_code == ExitCode.FAILED
    assert found.line() == f"{HALF}: not published, --require-gain 1.2 failed"
    said = "\n".join(lines((found,)))
    assert "at least 1.2 × as fast" in said and "unet 1.10 ×" in said and "lower --require" in said
    assert judge(Clock(1.0, 1.3), 1.2).published


def test_the_gate_fails_closed_where_nothing_could_be_timed(judge: Judge) -> None:
    dead = Clock(1.0, problem="the process was ended by signal 11")
    found = judge(dead, 1.2)
    assert not found.published and found.error and "signal 11" in found.error.found
    found = judge(dead)
    assert found.published and "NOT MEASURED: the process" in lines((found,))[0]


def test_a_deferred_variant_says_so_and_is_not_refused(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = SimpleNamespace(unavailable=lambda device: DeferredError("a phone"), tools=())
    monkeypatch.setattr(gains, "runtime_named", lambda name: absent)
    clock = Clock(1.0)
    found = judge(clock, 1.2)
    assert found.published and clock.orders == []
    assert lines((found,)) == [f"does it pay? {HALF}: deferred: onnx_session is not on this host"]


def test_a_second_build_takes_the_stored_verdict(judge: Judge, tmp_path: Path) -> None:
    first = judge(Clock(1.0, 1.5))
    keep(tmp_path / "bundle", first.gain or VariantGain())
    clock = Clock(1.0, 9.0)
    again = judge(clock, 1.2)
    assert clock.orders == [] and again.gain == first.gain and again.published
    assert lines((again,)) == lines((first,))


@pytest.mark.parametrize(
    "changed",
    [
        {"engines": {"unet": (sha256_bytes(b"other"), sha256_bytes(b"base"))}},
        {"tools": {"onnxruntime": "0.1"}},
        {"threads": 99},
        {"against": "another variant"},
        {"problem": "it died"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_verdict_of_other_engines_or_conditions_is_measured_again(
    judge: Judge, tmp_path: Path, changed: Mapping[str, Any]
) -> None:
    first = judge(Clock(1.0, 1.5)).gain
    assert first is not None
    keep(tmp_path / "bundle", first.model_copy(update=dict(changed)))
    clock = Clock(1.0, 3.0)
    again = judge(clock)
    assert len(clock.orders) == 1 and again.gain and again.gain.picture
    assert again.gain.picture.speed == 3.0


def test_a_verdict_of_another_host_is_measured_again(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "bundle", judge(Clock(1.0, 1.5)).gain or VariantGain())
    here = gains.this_host()
    monkeypatch.setattr(
        gains, "this_host", lambda: here.model_copy(update={"processor": "another"})
    )
    clock = Clock(1.0, 3.0)
    judge(clock)
    assert len(clock.orders) == 1


def test_a_stored_verdict_that_would_refuse_is_measured_again(judge: Judge, tmp_path: Path) -> None:
    """The machine may have been busy then."""
    keep(tmp_path / "bundle", judge(Clock(1.0, 1.1)).gain or VariantGain())
    clock = Clock(1.0, 1.5)
    assert judge(clock, 1.2).published and len(clock.orders) == 1


def test_a_gate_with_nothing_to_judge_is_a_usage_error(plan: Plan) -> None:
    refuse_idle_gate(plan, 1.2)
    refuse_idle_gate(make_plan(None, "onnx-cpu"), None)
    with pytest.raises(UsageError, match="plain fp32"):
        refuse_idle_gate(make_plan(None, "onnx-cpu"), 1.2)
    with pytest.raises(UsageError, match="--component"):
        refuse_idle_gate(make_plan(None, HALF, ("unet",)), 1.2)


def test_calls_of_a_picture_follow_steps_and_guidance(plan: Plan) -> None:
    assert calls_of_a_picture(plan) == {"text_encoder": 1, "unet": 4, "vae_decoder": 1}
