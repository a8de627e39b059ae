"""Checks a bundle on this host: digests first, then parity from its golden vectors.

Nothing of the PyTorch original is needed: recordings hold what it computed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffoundry.artifacts import disk
from diffoundry.artifacts.bundle import Bundle, open_bundle
from diffoundry.artifacts.evidence import (
    BuiltEngine,
    VariantEvidence,
    new_evidence,
    read_evidence,
    update_evidence,
)
from diffoundry.artifacts.junit import junit_xml
from diffoundry.artifacts.manifest import EVIDENCE, VariantRecord
from diffoundry.choosing import opening_of, runtime_problem
from diffoundry.completing import keep_engines
from diffoundry.errors import (
    ArtifactError,
    BundleError,
    DeferredError,
    DiffoundryError,
    ExitCode,
    MissingToolError,
    worst,
)
from diffoundry.formats.canonical import atomic_write
from diffoundry.generation import PICTURE_COMPONENTS
from diffoundry.models.pipeline import PREVIEW
from diffoundry.sessions import Opening
from diffoundry.types import CheckResult, ParityResult, Session

FILES = "files"
PIPELINE = "pipeline"
Say = Callable[[str], None]


@dataclass(frozen=True)
class VariantReport:
    """What became of one variant here. `error` is a tool that is missing; then nothing ran."""

    name: str
    results: tuple[ParityResult, ...]
    error: DiffoundryError | None = None

    @property
    def exit_code(self) -> ExitCode:
        if self.error is not None:
            return self.error.exit_code
        if not self.results or any(result.failed for result in self.results):
            return ExitCode.FAILED
        passed = all(result.passed for result in self.results)
        return ExitCode.DONE if passed else ExitCode.DEFERRED


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify`. `digest` is the manifest's ("" where it could not be read).

    `files` is the check of every digest; where it fails no engine is opened, and `variants` is
    empty. `evidence` is the file that `complete` wrote.
    """

    digest: str
    files: ParityResult
    variants: tuple[VariantReport, ...]
    allow_deferred: bool = False
    evidence: Path | None = None

    @property
    def exit_code(self) -> ExitCode:
        if not self.files.passed:
            return ExitCode.FAILED
        code = worst([variant.exit_code for variant in self.variants] or [ExitCode.FAILED])
        return ExitCode.DONE if code == ExitCode.DEFERRED and self.allow_deferred else code

    @property
    def results(self) -> tuple[ParityResult, ...]:
        """Every result, the files' first."""
        return (self.files, *(r for variant in self.variants for r in variant.results))


def verify(
    path: Path,
    *,
    variant: str | None = None,
    complete: bool = False,
    allow_deferred: bool = False,
    say: Say = lambda line: None,
) -> VerifyReport:
    """Verify the bundle at `path`: all its variants, or the named one.

    `complete` writes what ran here into evidence/<host>.json. Raises UsageError where there is
    no such folder or evidence cannot be written, BundleError for an unknown variant; a bundle
    that cannot be trusted is a failed report, not an exception.
    """
    say("checking digests")
    try:
        bundle = open_bundle(path)
    except BundleError as error:
        return VerifyReport("", _files_result([error.text()], 0), (), allow_deferred)
    chosen = (bundle.manifest.variant(variant),) if variant else bundle.manifest.variants
    files = _files_result(bundle.verify_files(), len(bundle.manifest.files))
    if not files.passed:
        return VerifyReport(bundle.digest, files, (), allow_deferred)
    reports = tuple(_verify_variant(bundle, one, say) for one in chosen)
    evidence = _write_evidence(bundle, reports) if complete else None
    return VerifyReport(bundle.digest, files, reports, allow_deferred, evidence)


def write_junit(report: VerifyReport, path: Path) -> None:
    """Write `report` as a JUnit XML file. Raises UsageError where it cannot be written."""
    suites: dict[str, Sequence[ParityResult]] = {FILES: (report.files,)}
    for variant in report.variants:
        suites[variant.name] = variant.results or _stopped(variant.error)
    with disk.explained(f"--junit {path}", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, junit_xml("diffoundry verify", suites).decode())


def _files_result(problems: list[str], count: int) -> ParityResult:
    if problems:
        checks = tuple(CheckResult(FILES, FILES, "failed", message=text) for text in problems)
    else:
        checks = (CheckResult(FILES, FILES, "passed", values={"files": count}),)
    return ParityResult(FILES, checks)


def _stopped(error: DiffoundryError | None) -> tuple[ParityResult, ...]:
    """What stopped a variant before its first check, as a result that is no pass."""
    message = error.text() if error is not None else "no check ran"
    return (ParityResult("runtime", (CheckResult("open", "open", "failed", message=message),)),)


def _verify_variant(bundle: Bundle, variant: VariantRecord, say: Say) -> VariantReport:
    problem = runtime_problem(variant)
    if problem is not None and not isinstance(problem, DeferredError):
        return VariantReport(variant.name, (), problem)
    try:
        openings = {name: opening_of(bundle, variant, name) for name in variant.engines}
    except DiffoundryError as error:
        return VariantReport(variant.name, (_unopened(PIPELINE, "failed", error),))
    helpers = [one.stand_in.runtime for one in openings.values() if one.stand_in is not None]
    problems = [one.problem for one in openings.values() if one.problem is not None]
    damaged = any(not isinstance(one, DeferredError) for one in problems)
    if problem is not None and not helpers and not damaged:
        why = next(iter(problems), problem)
        subjects = (*variant.engines, PIPELINE)
        results = [_unopened(name, "deferred", why) for name in subjects]
        return VariantReport(variant.name, tuple(results))
    by = f" (by {helpers[0]}: {variant.runtime} is not on this host)" if helpers else ""
    results = []
    try:
        for name, check in _checks_of(bundle, variant, openings):
            say(f"{variant.name}: {name}{by}")
            results.append(_guarded(name, check))
    except MissingToolError as error:
        return VariantReport(variant.name, tuple(results), error)
    return VariantReport(variant.name, tuple(results))


def _unopened(
    subject: str, status: Literal["failed", "deferred"], problem: DiffoundryError
) -> ParityResult:
    check = CheckResult("open", "open", status, subject, message=problem.text())
    return ParityResult(subject, (check,))


def _guarded(subject: str, check: Callable[[], ParityResult]) -> ParityResult:
    """Run one engine's checks; an error that is not of this host is a failure of the bundle."""
    try:
        return check()
    except MissingToolError:
        raise
    except DiffoundryError as error:
        return _unopened(subject, "failed", error)


def _checks_of(
    bundle: Bundle, variant: VariantRecord, openings: Mapping[str, Opening]
) -> Iterator[tuple[str, Callable[[], ParityResult]]]:
    for component, opening in openings.items():
        yield component, functools.partial(_check_component, bundle, variant, component, opening)
    yield PIPELINE, functools.partial(_check_pipeline, bundle, variant, openings)


def _check_component(
    bundle: Bundle, variant: VariantRecord, component: str, opening: Opening
) -> ParityResult:
    from diffoundry.formats import quant_plan, recording, simulation
    from diffoundry.formats.kinds import integer_layers_of
    from diffoundry.parity.component import check_component
    from diffoundry.parity.device import with_device_line
    from diffoundry.parity.limits import LOSSLESS

    folder = bundle.golden(component)
    recording.validate(folder)
    recorded = recording.load_component(folder)
    # Else an engine could be swapped together with the vectors of another component.
    if recorded.contract != bundle.contract(component):
        raise ArtifactError(
            f"golden vectors of {component}",
            expected=f"recorded with the contract that the manifest gives {component}",
            found=f"another contract, of {recorded.contract.component}",
            remedy="do not use this bundle; get it again from whoever made it",
        )
    compressed = bundle.simulation(variant, component)
    if compressed is not None:
        simulation.validate(compressed)
    plan = bundle.compression(variant, component)[0]
    fp32 = _fp32_variant(bundle, variant, component)
    result = check_component(
        opening.open,
        bundle.engine(variant, component).type,
        opening.artifact.contract or bundle.contract(component),
        recorded,
        variant.limits.get("call", LOSSLESS),
        opening_of(bundle, fp32, component).open if fp32 else None,
        proven_at_build=True,
        simulation=simulation.load(compressed) if compressed else None,
        drift_limits=variant.limits.get("drift"),
        planned=quant_plan.read_layers(plan) if plan else None,
        stored=integer_layers_of(opening.artifact) if plan else None,
    )
    return with_device_line(result, [opening])


def _fp32_variant(bundle: Bundle, variant: VariantRecord, component: str) -> VariantRecord | None:
    """A variant of the same runtime whose engine is in fp32: effects below fp16's floor show."""
    if variant.precision == "fp32":
        return None
    for other in bundle.manifest.variants:
        same = other.runtime == variant.runtime and other.device == variant.device
        if not other.compressed and same and component in other.engines:
            return other
    return None


def _check_pipeline(
    bundle: Bundle, variant: VariantRecord, openings: Mapping[str, Opening]
) -> ParityResult:
    from diffoundry.formats import recording, step_table
    from diffoundry.models.tokenizer import Tokenizer
    from diffoundry.parity.device import with_device_line
    from diffoundry.parity.pipeline import IMAGE_LIMITS, TRAJECTORY_LIMITS, check_pipeline

    folder = bundle.golden(PIPELINE)
    recording.validate(folder)
    geometry = bundle.manifest.model.geometry
    names = (*PICTURE_COMPONENTS, PREVIEW)
    wanted = {name: openings[name] for name in names if name in openings}
    result = check_pipeline(
        functools.partial(_open_all, bundle, variant, wanted),
        Tokenizer.open(bundle.tokenizer, geometry.tokens),
        step_table.open_tables(bundle.step_tables),
        geometry,
        recording.load_pipeline(folder),
        variant.limits.get("trajectory", TRAJECTORY_LIMITS),
        variant.limits.get("image", IMAGE_LIMITS),
    )
    return with_device_line(result, list(wanted.values()))


def _open_all(
    bundle: Bundle, variant: VariantRecord, openings: Mapping[str, Opening]
) -> Mapping[str, Session]:
    """The engines that a picture from text needs, and the preview decoder's where there is one; all
    are closed again if one does not open."""
    names = (*PICTURE_COMPONENTS, *(name for name in openings if name == PREVIEW))
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for component in names:
            bundle.engine(variant, component)  # a variant that lacks one is a fault of the bundle
            session = openings[component].open()
            stack.callback(session.close)
            sessions[component] = session
        stack.pop_all()
        return sessions


def _write_evidence(bundle: Bundle, reports: tuple[VariantReport, ...]) -> Path:
    waiting = _deferred_elsewhere(bundle)
    ran = {
        report.name: VariantEvidence(
            results=report.results,
            precision_used=_precision_used(report.results),
            completed=tuple(
                result.subject
                for result in report.results
                if result.passed and (report.name, result.subject) in waiting
            ),
            engines=_engines_built(bundle, report),
        )
        for report in reports
        if report.results
    }
    with disk.explained(f"evidence of the bundle {bundle.path}", bundle.path):
        return update_evidence(bundle.path, new_evidence(bundle.digest, ran))


def _engines_built(bundle: Bundle, report: VariantReport) -> dict[str, BuiltEngine]:
    """What this host built and found right, copied into evidence/."""
    variant = bundle.manifest.variant(report.name)
    passed = [result.subject for result in report.results if result.passed]
    return keep_engines(bundle, variant, [name for name in passed if name in variant.engines])


def _deferred_elsewhere(bundle: Bundle) -> set[tuple[str, str]]:
    """(variant, subject) of every deferred check in the bundle's evidence of this manifest."""
    waiting = set()
    for path in sorted((bundle.path / EVIDENCE).glob("*.json")):
        try:
            evidence = read_evidence(path)
        except BundleError:
            continue
        if evidence.manifest_digest != bundle.digest:
            continue
        for name, variant in evidence.variants.items():
            waiting |= {
                (name, result.subject)
                for result in variant.results
                if not result.failed and not result.passed
            }
    return waiting


def _precision_used(results: tuple[ParityResult, ...]) -> dict[str, dict[str, Any]]:
    """Component -> what its runtime says it computed in, where the check read it back."""
    return {
        check.component: dict(check.values["used"])
        for result in results
        for check in result.checks
        if check.component and "used" in check.values
    }
