"""Which variant of a bundle runs on this host, and its engines as sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import VariantEvidence, evidence_path, read_evidence
from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.discovery import runtime_named
from diffoundry.errors import BundleError, DiffoundryError, MissingToolError, worst
from diffoundry.formats.step_table import open_tables
from diffoundry.generation import TextToImage
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.sessions import CheckedSession, open_session


@dataclass(frozen=True)
class Choice:
    """A variant and, in one line, why it was taken."""

    variant: VariantRecord
    why: str


def choose_variant(bundle: Bundle, name: str | None = None) -> Choice:
    """The named variant, else one whose runtime is here: the fastest that `bench --save` measured
    on this host, or, where nothing was measured, the first in the profile's order.

    Raises BundleError for an unknown name; the runtimes' own error where none is here.
    """
    if name is not None:
        return Choice(bundle.manifest.variant(name), "named on the command line")
    problems: list[DiffoundryError] = []
    here: list[VariantRecord] = []
    for variant in bundle.manifest.variants:
        problem = runtime_problem(variant)
        if problem is None:
            here.append(variant)
        else:
            problems.append(problem)
    if here:
        seconds = measured_seconds(bundle)
        measured = [variant for variant in here if variant.name in seconds]
        if measured:
            fastest = min(measured, key=lambda variant: seconds[variant.name])
            figure = f"{seconds[fastest.name] * 1e3:.1f} ms a picture"
            return Choice(fastest, f"the fastest of {len(measured)} measured here ({figure})")
        return Choice(here[0], f"the first whose runtime ({here[0].runtime}) is here")
    code = worst([problem.exit_code for problem in problems])
    raise next(problem for problem in problems if problem.exit_code == code)


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


def open_variant(
    bundle: Bundle, variant: VariantRecord, components: tuple[str, ...] = (), threads: int = 0
) -> Mapping[str, CheckedSession]:
    """Open a variant's engines (all, or the named components') with its runtime."""
    runtime = runtime_named(variant.runtime)
    return {
        name: open_session(
            runtime, bundle.engine(variant, name), bundle.contract(name), variant.device, threads
        )
        for name in components or variant.engines
    }


def text_to_image(bundle: Bundle, sessions: Mapping[str, CheckedSession]) -> TextToImage:
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
