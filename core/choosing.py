"""Which variant of a bundle runs on this host, and its engines as sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import VariantEvidence, evidence_path, read_evidence
from diffoundry.artifacts.manifest import Power, VariantRecord
from diffoundry.discovery import runtime_named
from diffoundry.errors import (
    BundleError,
    DeferredError,
    DiffoundryError,
    MissingToolError,
    UsageError,
    worst,
)
from diffoundry.formats import canonical
from diffoundry.formats.step_table import open_tables
from diffoundry.generation import PICTURE_COMPONENTS, TextToImage
from diffoundry.memory import free_memory
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.sessions import (
    CheckedSession,
    Opening,
    SessionOnDemand,
    choose_opening,
    open_session,
)
from diffoundry.types import Session


@dataclass(frozen=True)
class Choice:
    """A variant and, in one line, why it was taken. `by_stand_in`: not by its own runtime."""

    variant: VariantRecord
    why: str
    by_stand_in: bool = False


def choose_variant(bundle: Bundle, name: str | None = None, power: Power | None = None) -> Choice:
    """The named variant, else one whose runtime is here: the fastest that `bench --save` measured
    on this host, or, where nothing was measured, the first in the profile's order.

    `power`: only among the variants that were built for it; without it those for low or balanced
    power, which gave something up for it, come after all others. Only a variant that is named may
    be run by a stand-in for its runtime, and `why` says so. Raises UsageError for a name and a
    power at once, BundleError for an unknown name or a power that no variant has; the runtimes' own
    error where none is here.
    """
    if name is not None and power is not None:
        raise UsageError(
            "--variant and --power",
            expected="one of the two: both choose the engines",
            found=f"--variant {name} --power {power}",
            remedy="leave one of them out",
        )
    candidates = bundle.manifest.variants if power is None else _of_power(bundle, power)
    of_it = f" of power {power}" if power is not None else ""
    if name is not None:
        variant = bundle.manifest.variant(name)
        note = stand_in_note(bundle, variant)
        why = "named on the command line"
        return Choice(variant, f"{why}; {note}" if note else why, by_stand_in=bool(note))
    problems: list[DiffoundryError] = []
    here: list[VariantRecord] = []
    for variant in candidates:
        problem = runtime_problem(variant)
        if problem is None:
            here.append(variant)
        else:
            problems.append(problem)
    if here:
        if power is None:
            here = [v for v in here if v.power in (None, "full")] or here
        seconds = measured_seconds(bundle)
        measured = [variant for variant in here if variant.name in seconds]
        if measured:
            fastest = min(measured, key=lambda variant: seconds[variant.name])
            figure = f"{seconds[fastest.name] * 1e3:.1f} ms a picture"
            return Choice(
                fastest, f"the fastest of {len(measured)}{of_it} measured here ({figure})"
            )
        return Choice(here[0], f"the first{of_it} whose runtime ({here[0].runtime}) is here")
    code = worst([problem.exit_code for problem in problems])
    raise next(problem for problem in problems if problem.exit_code == code)


def _of_power(bundle: Bundle, power: Power) -> tuple[VariantRecord, ...]:
    """The variants that were built for `power`. Raises BundleError with those there are."""
    variants = bundle.manifest.variants
    found = tuple(variant for variant in variants if variant.power == power)
    if not found:
        there = ", ".join(f"{v.name} ({v.power or 'no power named'})" for v in variants)
        raise BundleError(
            f"--power {power}",
            expected=f"a variant whose power is {power}",
            found=there,
            remedy="name a power that is there, or one of these with --variant; a profile gives "
            "variants their power",
        )
    return found


def measured_seconds(bundle: Bundle) -> dict[str, float]:
    """Variant -> median seconds of a picture, as `bench --save` measured them on this host.

    Only evidence of this very manifest counts, and what cannot be read counts for nothing.
    """
    path = evidence_path(bundle.path)
    try:
        evidence = read_evidence(path) if path.is_file() else None
    except BundleError:
        evidence = None
    if evidence is None or evidence.manifest_digest != bundle.digest:
        return {}
    found = {name: _median(variant) for name, variant in evidence.variants.items()}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _median(variant: VariantEvidence) -> float | None:
    picture = (variant.bench or {}).get("picture_seconds")
    median = picture.get("median") if isinstance(picture, Mapping) else None
    usable = isinstance(median, int | float) and not isinstance(median, bool) and median > 0
    return float(median) if usable else None  # type: ignore[arg-type]


def runtime_problem(variant: VariantRecord) -> DiffoundryError | None:
    """Why a variant cannot run on this host, or None."""
    try:
        problem = runtime_named(variant.runtime).unavailable(variant.device)
    except DiffoundryError as error:  # a bundle of a newer version may name a runtime we lack
        return MissingToolError(
            f"variant {variant.name}",
            expected=f"the runtime {variant.runtime}",
            found=error.found,
            remedy="pip install --upgrade diffoundry",
        )
    return problem if isinstance(problem, DiffoundryError) else None


def opening_of(bundle: Bundle, variant: VariantRecord, component: str, threads: int = 0) -> Opening:
    """How one engine of a bundle is opened on this host. Raises BundleError where it has none."""
    artifact, contract = bundle.engine(variant, component), bundle.contract(component)
    return choose_opening(
        runtime_named, variant.runtime, artifact, contract, variant.device, threads
    )


def stand_in_note(
    bundle: Bundle, variant: VariantRecord, components: Sequence[str] = PICTURE_COMPONENTS
) -> str:
    """Who runs a variant whose runtime is deferred here, or "" where it runs itself or nobody can.

    Every one of `components` has to have a stand-in that can run here.
    """
    if not isinstance(runtime_problem(variant), DeferredError):
        return ""
    openings = [opening_of(bundle, variant, c) for c in components if c in variant.engines]
    found = [opening.stand_in for opening in openings if opening.stand_in is not None]
    if not found or len(found) < len(openings):
        return ""
    return f"{variant.runtime} is not on this host, {found[0].runtime} stands in: {found[0].note}"


def open_variant(
    bundle: Bundle,
    variant: VariantRecord,
    components: tuple[str, ...] = (),
    threads: int = 0,
    by_stand_in: bool = False,
) -> Mapping[str, CheckedSession]:
    """Open a variant's engines (all, or the named components') with its runtime.

    `by_stand_in` allows a stand-in where the runtime is deferred; the caller has to say so.
    """
    names = components or tuple(variant.engines)
    if by_stand_in:
        return {name: opening_of(bundle, variant, name, threads).open() for name in names}
    runtime = runtime_named(variant.runtime)
    return {
        name: open_session(
            runtime, bundle.engine(variant, name), bundle.contract(name), variant.device, threads
        )
        for name in names
    }


def variant_on_demand(
    bundle: Bundle,
    variant: VariantRecord,
    threads: int = 0,
    by_stand_in: bool = False,
    components: Sequence[str] = PICTURE_COMPONENTS,
) -> Mapping[str, SessionOnDemand]:
    """A picture's engines, each opened when it is first called; as `open_variant` otherwise."""

    def session(name: str) -> SessionOnDemand:
        engine = bundle.engine(variant, name)
        return SessionOnDemand(
            lambda: open_variant(bundle, variant, (name,), threads, by_stand_in)[name],
            engine.contract or bundle.contract(name),
            engine.type.shape_policy,
        )

    return {name: session(name) for name in components}


def too_large_together(bundle: Bundle, variant: VariantRecord) -> bool:
    """Whether U-Net and decoder had better not be held at once: their files come to more than a
    third of the memory that is free now (what a call needs comes on top)."""
    names = ("unet", "vae_decoder")
    sizes = [canonical.tree_size_bytes(bundle.engine(variant, name).path) for name in names]
    return 3 * sum(sizes) > free_memory()


def text_to_image(bundle: Bundle, sessions: Mapping[str, Session]) -> TextToImage:
    """The whole pipeline over `sessions`, with the bundle's tokenizer and step tables."""
    return TextToImage(
        sessions,
        Tokenizer.open(bundle.tokenizer),
        open_tables(bundle.step_tables),
        bundle.manifest.model.geometry,
    )


def refuse_changed_files(bundle: Bundle) -> None:
    """Raise BundleError where a file that is about to be used is not what the manifest says."""
    problems = bundle.verify_files(rehash=False)
    if problems:
        raise BundleError(
            f"bundle {bundle.path}",
            expected="the files that its manifest lists",
            found="; ".join(problems[:5]),
            remedy="do not use this bundle; get it again from whoever made it",
        )
