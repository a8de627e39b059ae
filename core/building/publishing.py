"""From a finished run to a bundle: which variants passed, what each needs, what was measured.

The unit is a variant with all its components: one that fails is not published, the others are;
where nothing passes, the old bundle stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.artifacts.content import BundleContent, VariantContent
from diffoundry.artifacts.evidence import StageMeasure, VariantEvidence
from diffoundry.artifacts.gain import VariantGain
from diffoundry.artifacts.manifest import Level, ModelRecord, SamplingRecord
from diffoundry.artifacts.write_bundle import Measured, check_output_folder, write_bundle
from diffoundry.building.compressed import compression_of
from diffoundry.building.driver import Driver, Outcome
from diffoundry.discovery import runtime_named
from diffoundry.errors import DiffoundryError, ExitCode
from diffoundry.formats import parity_result, step_table
from diffoundry.formats.canonical import canonical_json, sha256_bytes, tree_size_bytes
from diffoundry.models.pipeline import PREVIEW
from diffoundry.parity.checks.shape_range import sizes_not_checked
from diffoundry.parity.limits import LOSSLESS
from diffoundry.parity.pipeline import IMAGE_LIMITS, TRAJECTORY_LIMITS
from diffoundry.planning.graph import Plan, VariantPlan
from diffoundry.planning.judging import is_embedded
from diffoundry.planning.keys import tool_version
from diffoundry.planning.shapes import shape_policy_of
from diffoundry.types import Limits, ParityResult

__all__ = [
    "Publication",
    "VariantOutcome",
    "check_output_folder",
    "judge",
    "parity_results",
    "publish",
]

DEFAULT_LIMITS: Mapping[Level, Limits] = {
    "call": LOSSLESS,
    "trajectory": TRAJECTORY_LIMITS,
    "image": IMAGE_LIMITS,
}
"""What a level is held to where the profile leaves it out."""

PREVIEW_NOTE = (
    f"{PREVIEW} is no part of the model: a small decoder for previews (`generate --preview`); how "
    "far its pictures are from the full decoder's stands in evidence/, as `image: preview`"
)


@dataclass(frozen=True)
class VariantOutcome:
    """What became of one variant: its parity, or the error that stopped it; and what it gains,
    where it is a compressed one that was timed."""

    name: str
    exit_code: ExitCode
    results: tuple[ParityResult, ...] = ()
    error: DiffoundryError | None = None
    gain: VariantGain | None = None

    def refused(self, error: DiffoundryError) -> VariantOutcome:
        """The same variant, not to be published although its parity passed."""
        return dataclasses.replace(self, exit_code=error.exit_code, error=error)

    def with_gain(self, gain: VariantGain) -> VariantOutcome:
        return dataclasses.replace(self, gain=gain)

    @property
    def published(self) -> bool:
        return self.exit_code in (ExitCode.DONE, ExitCode.DEFERRED)

    def line(self) -> str:
        """One line for people."""
        if self.error is not None:
            return f"{self.name}: not published, {self.error.where.splitlines()[0]} failed"
        if self.exit_code == ExitCode.FAILED:
            failed = [c for r in self.results for c in r.checks if c.status == "failed"]
            return f"{self.name}: not published, {len(failed)} parity check(s) failed"
        deferred = [c for r in self.results for c in r.checks if c.status == "deferred"]
        if deferred:
            names = {str(c.values["stand_in"]) for c in deferred if "stand_in" in c.values}
            here = f"passed here by {', '.join(sorted(names))}, " if names else ""
            count = len(deferred)
            return f"{self.name}: published, {here}{count} check(s) DEFERRED to the target host"
        unseen = sizes_not_checked(c for r in self.results for c in r.checks)
        return f"{self.name}: published, parity passed{unseen}"


@dataclass(frozen=True)
class Publication:
    """What a build left behind. `path` is None where nothing passed."""

    variants: tuple[VariantOutcome, ...]
    path: Path | None = None
    digest: str | None = None
    changed: bool = False
    size_bytes: int = 0

    def lines(self) -> list[str]:
        """What to tell people."""
        lines = [variant.line() for variant in self.variants]
        if self.path is None:
            return [*lines, "nothing passed: no bundle was written, an older one was left as it is"]
        state = "written" if self.changed else "unchanged"
        return [
            *lines,
            f"bundle {state}: {self.path} ({self.size_bytes / 1e6:.1f} MB, {self.digest})",
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path) if self.path else None,
            "manifest_digest": self.digest,
            "changed": self.changed,
            "size_bytes": self.size_bytes,
            "variants": [
                {
                    "name": variant.name,
                    "published": variant.published,
                    "error": variant.error.as_json() if variant.error else None,
                    "parity": variant.results,
                    "gain": variant.gain,
                }
                for variant in self.variants
            ],
        }


def judge(driver: Driver) -> tuple[VariantOutcome, ...]:
    """What became of each variant of a finished run, by its parity."""
    return tuple(_variant_outcome(driver, variant) for variant in driver.plan.variants)


def publish(
    driver: Driver, out: Path, outcomes: tuple[VariantOutcome, ...] | None = None
) -> Publication:
    """Write the bundle of every variant that passed. Raises what `write_bundle` raises.

    `outcomes`: those of `judge`, where somebody added to them.
    """
    outcomes = judge(driver) if outcomes is None else outcomes
    passed = {outcome.name for outcome in outcomes if outcome.published}
    variants = [v for v in driver.plan.variants if v.request.name in passed]
    if not variants:
        return Publication(outcomes)
    measured = Measured(
        {
            outcome.name: VariantEvidence(
                results=outcome.results,
                precision_used=_precision_used(outcome.results),
                size_bytes=sum(
                    tree_size_bytes(driver.artifact(ref).path) for ref in variant.engines.values()
                ),
                gain=outcome.gain,
            )
            for outcome, variant in zip(outcomes, driver.plan.variants, strict=True)
            if outcome.published
        },
        _stage_measures(driver, variants),
    )
    written = write_bundle(out, _content(driver, variants), measured, driver.store.hashes)
    manifest = written.bundle.manifest
    return Publication(
        outcomes,
        out,
        written.bundle.digest,
        written.changed,
        sum(record.size_bytes for record in manifest.files.values()),
    )


def parity_results(driver: Driver, variant: VariantPlan) -> tuple[ParityResult, ...]:
    """The results of a variant's checks that ran."""
    finished = [
        driver.artifact(reference)
        for reference in variant.checks.values()
        if driver.outcomes[reference.partition(":")[0]].entry is not None
    ]
    return tuple(parity_result.load(artifact.path) for artifact in finished)


def _variant_outcome(driver: Driver, variant: VariantPlan) -> VariantOutcome:
    name = variant.request.name
    results = parity_results(driver, variant)
    needed = driver.plan.ancestors([*variant.checks.values(), *variant.engines.values()])
    for node_id in needed:
        outcome = driver.outcomes.get(node_id)
        if outcome is not None and outcome.error is not None:
            return VariantOutcome(name, outcome.error.exit_code, results, outcome.error)
    if any(result.failed for result in results) or len(results) < len(variant.checks):
        return VariantOutcome(name, ExitCode.FAILED, results)
    if not all(result.passed for result in results):
        return VariantOutcome(name, ExitCode.DEFERRED, results)
    return VariantOutcome(name, ExitCode.DONE, results)


def _content(driver: Driver, variants: list[VariantPlan]) -> BundleContent:
    plan = driver.plan
    step_tables = driver.artifact(plan.step_tables).path
    tables = step_table.open_tables(step_tables)
    judging = plan.judging
    return BundleContent(
        model=_model_record(driver),
        profile=plan.profile.name,
        contracts=plan.contracts,
        variants=tuple(_variant_content(driver, variant) for variant in variants),
        sampling=SamplingRecord(
            schedulers=tables.schedulers,
            scheduler=judging.scheduler,
            steps=judging.steps,
            guidance=judging.guidance,
        ),
        golden={name: driver.artifact(ref).path for name, ref in plan.recordings.items()},
        step_tables=step_tables,
        tokenizer=plan.source.tokenizer_path,
        tools=_tools(driver, variants),
        notes=(
            *(f"left out: {name}" for name in plan.source.left_out),
            *((PREVIEW_NOTE,) if PREVIEW in plan.contracts else ()),
        ),
    )


def _model_record(driver: Driver) -> ModelRecord:
    source = driver.plan.source
    digests = {name: a.digest for name, a in driver.source_artifacts().items()}
    return ModelRecord(
        name=source.name,
        source_digest=sha256_bytes(canonical_json(digests)),
        pipeline_class=source.pipeline_class,
        geometry=source.geometry,
        revision=source.revision,
        left_out=source.left_out,
        licence="Apache-2.0" if is_embedded(source) else None,
    )


def _variant_content(driver: Driver, variant: VariantPlan) -> VariantContent:
    request = variant.request
    runtime = runtime_named(request.runtime)
    limits = {**DEFAULT_LIMITS, **driver.plan.profile.limits, **request.limits}
    return VariantContent(
        name=request.name,
        runtime=request.runtime,
        device=request.device,
        precision=request.precision,
        shape_policy=shape_policy_of(driver.plan, request),
        engines={name: driver.artifact(ref) for name, ref in variant.engines.items()},
        limits=limits,
        extra=runtime.extra,
        requires={tool: _lowest_version(tool, runtime.extra) for tool in runtime.tools}
        | dict(getattr(runtime, "lowest", {})),
        notes=tuple(filter(None, [getattr(runtime, "note", "")])),
        power=request.power,
        compression=compression_of(driver, variant),
    )


def _lowest_version(distribution: str, extra: str) -> str:
    """The lower bound that our base or this extra states, else the version tested here."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("diffoundry") or []:
            bound = re.match(rf"{re.escape(distribution)}>=([\w.]+)", line)
            extras = re.findall(r"extra == ['\"]([\w-]+)['\"]", line)
            if bound and (not extras or extra in extras):
                return bound[1]
    return tool_version(distribution)


def _tools(driver: Driver, variants: list[VariantPlan]) -> Mapping[str, str]:
    """Versions of every tool that made something in the bundle."""
    tools: dict[str, str] = {}
    for outcome in _outcomes_of(driver, variants):
        if outcome.entry is not None:
            tools.update(outcome.entry.tools)
    return tools


def _stage_measures(driver: Driver, variants: list[VariantPlan]) -> tuple[StageMeasure, ...]:
    return tuple(
        StageMeasure(
            stage=outcome.entry.stage,
            component=outcome.entry.component,
            key=outcome.key,
            seconds=outcome.entry.seconds,
            peak_memory_bytes=outcome.entry.peak_memory_bytes,
        )
        for outcome in _outcomes_of(driver, variants)
        if outcome.entry is not None
    )


def _outcomes_of(driver: Driver, variants: list[VariantPlan]) -> list[Outcome]:
    """Outcomes of the nodes behind these variants, in the plan's order."""
    plan: Plan = driver.plan
    references = [ref for v in variants for ref in (*v.checks.values(), *v.engines.values())]
    needed = plan.ancestors(references)
    return [driver.outcomes[node_id] for node_id in plan.nodes if node_id in needed]


def _precision_used(results: tuple[ParityResult, ...]) -> dict[str, dict[str, Any]]:
    return {
        check.component: dict(check.values["used"])
        for result in results
        for check in result.checks
        if check.component and "used" in check.values
    }
