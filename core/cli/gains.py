"""Does it pay? What a build times of its compressed variants before it publishes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffoundry.artifacts.evidence import evidence_path, read_evidence, this_host
from diffoundry.artifacts.gain import VariantGain
from diffoundry.benching.gains import (
    GainAnswer,
    GainOrder,
    Pair,
    gain_of,
    measure_gains,
    picture_gain,
)
from diffoundry.benching.request import usual_threads
from diffoundry.building.compressed import is_compressed, variant_is_compressed
from diffoundry.building.driver import Driver
from diffoundry.building.publishing import VariantOutcome
from diffoundry.discovery import runtime_named
from diffoundry.errors import DeferredError, DiffoundryError, StageError, UsageError
from diffoundry.parity.checks.planned import KERNELS, LEVEL as PLANNED
from diffoundry.planning.graph import Plan, VariantPlan, node_of
from diffoundry.planning.keys import tool_version
from diffoundry.types import ParityResult

EAGER = "torch_eager"
Say = Callable[[str], None]
Measure = Callable[[GainOrder], GainAnswer]


@dataclass(frozen=True)
class Baseline:
    """What a variant is held against: its name, its runtime, and component -> reference."""

    name: str
    runtime: str
    engines: Mapping[str, str]


def refuse_idle_gate(plan: Plan, required: float | None) -> None:
    """Raise UsageError where `--require-gain` would have nothing to judge."""
    if required is None:
        return
    found = ""
    if not plan.whole:
        found = "--component, with which nothing is published"
    elif not any(variant_is_compressed(plan, variant) for variant in plan.variants):
        found = f"profile {plan.profile.name}, where every variant is plain fp32"
    if found:
        raise UsageError(
            "--require-gain",
            expected="a build that publishes a compressed variant (fp16, INT8 or pruned)",
            found=found,
            remedy="leave it out, or build a profile with such a variant",
        )


def with_gains(
    driver: Driver,
    outcomes: tuple[VariantOutcome, ...],
    out: Path,
    required: float | None,
    say: Say,
    measure: Measure = measure_gains,
) -> tuple[VariantOutcome, ...]:
    """The outcomes with what each compressed variant gains on this host, those refused that gain
    less than `required`.

    Figures of an earlier build are taken from the evidence of `out` where engines, tools, threads
    and host are the same; a variant that would be refused by them is measured again.
    """
    passed = {outcome.name for outcome in outcomes if outcome.published}
    found = []
    for outcome, variant in zip(outcomes, driver.plan.variants, strict=True):
        if outcome.published and variant_is_compressed(driver.plan, variant):
            gain = _gain_of(driver, variant, passed, out, required, say, measure)
            outcome = outcome.with_gain(_with_kernels(gain, outcome.results))
            error = _shortfall(outcome, required)
            outcome = outcome.refused(error) if error is not None else outcome
        found.append(outcome)
    return tuple(found)


def _gain_of(
    driver: Driver,
    variant: VariantPlan,
    passed: Collection[str],
    out: Path,
    required: float | None,
    say: Say,
    measure: Measure,
) -> VariantGain:
    request = variant.request
    problem = runtime_named(request.runtime).unavailable(request.device)
    if isinstance(problem, DeferredError):
        return VariantGain(deferred=f"{request.runtime} is not on this host")
    baseline = baseline_of(driver.plan, variant, passed)
    order = _order(driver, variant, baseline)
    new = VariantGain(
        against=baseline.name,
        unchanged=tuple(pair.component for pair in order.pairs if pair.same),
        engines={p.component: (p.engine.digest, p.baseline.digest) for p in order.pairs},
        tools=_tools(order),
        threads=order.threads,
    )
    stored = _stored(out, request.name, new)
    if stored is not None and not _is_short(stored, required):
        return stored
    say(f"{request.name}: timed against {baseline.name}")
    answer = measure(order)
    if answer.problem:
        return new.model_copy(update={"problem": answer.problem})
    sizes = {pair.component: pair.size_bytes for pair in order.pairs}
    return new.model_copy(
        update={
            "components": {
                name: gain_of(seconds.baseline, seconds.engine, sizes[name])
                for name, seconds in answer.seconds.items()
                if name not in new.unchanged
            },
            "picture": picture_gain(order, answer, calls_of_a_picture(driver.plan)),
        }
    )


def _with_kernels(gain: VariantGain, results: Sequence[ParityResult]) -> VariantGain:
    """Beside each component's speed: how many planned layers its check saw in integer kernels."""
    counts = {
        check.component: {
            "integer_layers": check.values.get("executed"),
            "planned_layers": check.values.get("planned"),
        }
        for result in results
        for check in result.checks
        if check.level == PLANNED and check.name == KERNELS and check.component
    }
    components = {
        name: one.model_copy(update=counts.get(name, {})) for name, one in gain.components.items()
    }
    return gain.model_copy(update={"components": components})


def baseline_of(plan: Plan, variant: VariantPlan, passed: Collection[str]) -> Baseline:
    """The plain fp32 variant of the same runtime and device that goes into the bundle; else the
    fp32 engines that the checks had beside the compressed ones; else PyTorch eager."""
    request = variant.request
    full = [
        other
        for other in plan.variants
        if (other.request.runtime, other.request.device) == (request.runtime, request.device)
        and other.request.name in passed
        and not variant_is_compressed(plan, other)
    ]
    full.sort(key=lambda other: other.request.shape_kind != request.shape_kind)
    if full:
        return Baseline(full[0].request.name, request.runtime, full[0].engines)
    engines = {name: _uncompressed(plan, variant, name) for name in variant.engines}
    own = {name: engine for name, engine in engines.items() if engine is not None}
    if len(own) == len(engines):
        return Baseline("the fp32 engines of the same route", request.runtime, own)
    return Baseline("PyTorch eager", EAGER, {name: f"source:{name}" for name in engines})


def _uncompressed(plan: Plan, variant: VariantPlan, component: str) -> str | None:
    """The fp32 engine of a component's route: its own, where nothing was done to it."""
    if not is_compressed(plan, variant, component):
        return variant.engines[component]
    check = plan.nodes[node_of(variant.checks[component])]
    return check.inputs.get("reference_engine")


def calls_of_a_picture(plan: Plan) -> dict[str, int]:
    """Component -> how often a picture from text calls it, as `generate` would by default."""
    guided = plan.source.geometry.guidance_embedding_dim is None and plan.judging.guidance > 1
    twice = 2 if guided else 1
    return {"text_encoder": twice, "unet": twice * plan.judging.steps, "vae_decoder": 1}


def _order(driver: Driver, variant: VariantPlan, baseline: Baseline) -> GainOrder:
    pairs = [
        Pair(
            component=name,
            engine=driver.artifact(engine),
            baseline=driver.artifact(baseline.engines[name]),
            contract=driver.plan.contracts[name],
            recording=driver.artifact(driver.plan.recordings[name]).path,
        )
        for name, engine in variant.engines.items()
    ]
    request = variant.request
    return GainOrder(
        request.runtime, baseline.runtime, request.device, usual_threads(), tuple(pairs)
    )


def _tools(order: GainOrder) -> dict[str, str]:
    names = {
        tool
        for name in (order.runtime, order.baseline_runtime)
        for tool in runtime_named(name).tools
    }
    return {name: tool_version(name) for name in sorted(names)}


def _stored(out: Path, name: str, wanted: VariantGain) -> VariantGain | None:
    """What the evidence at `out` says of the same engines on the same host, or None."""
    try:
        path = evidence_path(out)
        evidence = read_evidence(path) if path.is_file() else None
    except DiffoundryError:
        return None
    if evidence is None or name not in evidence.variants:
        return None
    found = evidence.variants[name].gain
    here = this_host()
    same_host = (evidence.host.name, evidence.host.processor, evidence.host.cores) == (
        here.name, here.processor, here.cores,
    )  # fmt: skip
    if found is None or found.problem or found.picture is None or not same_host:
        return None
    keys = ("against", "engines", "tools", "threads")
    same = all(getattr(found, key) == getattr(wanted, key) for key in keys)
    return found if same else None


def _is_short(gain: VariantGain, required: float | None) -> bool:
    return required is not None and (gain.picture is None or gain.picture.speed < required)


def _shortfall(outcome: VariantOutcome, required: float | None) -> StageError | None:
    """Why `--require-gain` refuses a variant. One that is deferred is not refused, but said."""
    gain = outcome.gain
    if required is None or gain is None or gain.deferred or not _is_short(gain, required):
        return None
    where = f"--require-gain {required:g}"
    if gain.picture is None:
        return StageError(
            where,
            expected=f"{outcome.name} timed against {gain.against}",
            found=gain.problem or "a component that a picture needs is not in this variant",
            remedy="mend that, or leave --require-gain out",
        )
    slow = [name for name, one in gain.components.items() if one.speed < required]
    parts = "; ".join(f"{n} {g.speed:.2f} × ({g.figures})" for n, g in gain.components.items())
    return StageError(
        where,
        expected=f"a picture of {outcome.name} at least {required:g} × as fast as with "
        f"{gain.against}",
        found=f"{gain.picture.speed:.2f} × ({gain.picture.figures}); {parts}",
        remedy=f"leave {', '.join(slow) or 'it'} uncompressed for this runtime "
        "(component_routes in the profile), take another runtime or a host with integer kernels, "
        "run the build again when the machine is idle, or lower --require-gain",
    )


def lines(outcomes: tuple[VariantOutcome, ...]) -> list[str]:
    """Every compressed variant's verdict, and what the gate says of those that it refused."""
    said = [line for one in outcomes if one.gain is not None for line in one.gain.lines(one.name)]
    refused = [one.error for one in outcomes if one.gain is not None and one.error is not None]
    return [*said, *(error.text() for error in refused)]
