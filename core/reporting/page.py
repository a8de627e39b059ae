"""The page: one HTML file that asks for nothing else, and needs no script."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from diffoundry.reporting.attributes import REFERENCE, TOGETHER
from diffoundry.reporting.costs import duration, megabytes, sizes_section, stages_section
from diffoundry.reporting.gallery import attributes_section, pictures_section
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Html, code, el
from diffoundry.reporting.paying import paying_section
from diffoundry.reporting.proof import (
    deferred_section,
    lineage_section,
    notes_section,
    parity_section,
    tools_section,
    variants_section,
)
from diffoundry.reporting.speed import speed_section
from diffoundry.reporting.targets import targets_section

# No script, no font, no picture from elsewhere: the browser itself would refuse one.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

SECTIONS: tuple[tuple[str, str, Callable[[Report], Html | None]], ...] = (
    ("variants", "Variants", variants_section),
    ("targets", "Targets", targets_section),
    ("pictures", "Pictures", pictures_section),
    ("attributes", "Attributes", attributes_section),
    ("parity", "Parity", parity_section),
    ("deferred", "Deferred", deferred_section),
    ("paying", "Does it pay?", paying_section),
    ("speed", "Speed", speed_section),
    ("sizes", "Sizes", sizes_section),
    ("stages", "Build", stages_section),
    ("lineage", "Lineage", lineage_section),
    ("notes", "Notes", notes_section),
    ("tools", "Tools", tools_section),
)


def write_page(report: Report) -> str:
    """The whole document. The same report gives the same text."""
    model = report.bundle.manifest.model.name
    parts = [(anchor, name, make(report)) for anchor, name, make in SECTIONS]
    shown = [(anchor, name, part) for anchor, name, part in parts if part is not None]
    links = [el("li", el("a", name, href=f"#{anchor}")) for anchor, name, _ in shown]
    title = f"{model}: {report.verdict.title.lower()} · Diffoundry report"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content="diffoundry report"),
        el("title", title),
        el("style", Html(_style())),
    )
    body = el(
        "body",
        el("a", "Skip to the pictures", href="#pictures", class_="skip"),
        _header(report),
        el("nav", el("ul", links), aria_label="Parts of this report"),
        el("main", [part for *_, part in shown]),
        _footer(),
    )
    return "<!doctype html>\n" + el("html", head, "\n", body, lang="en") + "\n"


def _style() -> str:
    return resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def _header(report: Report) -> Html:
    manifest = report.bundle.manifest
    geometry = manifest.model.geometry
    sampling = manifest.sampling
    verdict = report.verdict
    what = (
        f"{manifest.model.pipeline_class}, {geometry.native_width_pixels} × "
        f"{geometry.native_height_pixels} pixels, {sampling.steps} steps of {sampling.scheduler}, "
        f"guidance {sampling.guidance:g}; profile "
    )
    hosts = ", ".join(one.host.name for one in report.evidence) or "none yet"
    return el(
        "header",
        el("p", "Diffoundry report", class_="overline"),
        el("h1", manifest.model.name),
        el("p", what, code(manifest.profile), class_="lead"),
        el(
            "div",
            el("p", verdict.title, class_="word"),
            el("p", verdict.sentence),
            class_=f"verdict {verdict.status.replace(' ', '-')}",
            role="status",
        ),
        el("dl", [_tile(*one) for one in _figures(report)], class_="tiles"),
        el("p", "Bundle ", el("code", report.bundle.digest), class_="digest"),
        el("p", f"Measured on: {hosts}", class_="digest"),
    )


def _figures(report: Report) -> list[tuple[str, str, str]]:
    """The few numbers that a reader looks for first: (name, figure, what it says)."""
    found = []
    engines = [one for pair in report.pictures.pairs for one in pair.engines]
    decibels = {one.psnr_db: one.variant for one in engines if one.psnr_db is not None}
    if decibels:
        pairs = len(report.pictures.pairs)
        of = f"of {pairs} {'picture' if pairs == 1 else 'pictures'}: {decibels[min(decibels)]}"
        found.append(("Worst PSNR against PyTorch", f"{min(decibels):.1f} dB", of))
    if report.scores:
        scores = report.scores[TOGETHER]
        worst = min(scores, key=lambda who: scores[who].accuracy)
        original = f"PyTorch itself: {scores[REFERENCE].hits} of {scores[REFERENCE].count}"
        found.append(("Prompts right", f"{scores[worst].hits} of {scores[worst].count}", original))
    variants = report.bundle.manifest.variants
    sizes = {v.name: sum(e.size_bytes for e in v.engines.values()) for v in variants}
    small = min(sizes, key=lambda name: sizes[name])
    name = "Size of the engines" if len(sizes) == 1 else "Smallest variant"
    found.append((name, megabytes(sizes[small]), small))
    stages = [stage for one in report.evidence for stage in one.stages]
    if stages:
        work = duration(sum(stage.seconds for stage in stages))
        found.append(("Work of the build", work, f"in {len(stages)} stages"))
    return found


def _tile(name: str, figure: str, text: str) -> Html:
    return el("div", el("dt", name), el("dd", el("b", figure), el("span", text)))


def _footer() -> Html:
    return el(
        "footer",
        el(
            "p",
            code("diffoundry verify BUNDLE"),
            " repeats these checks on your host. The engines drew their pictures for this page; "
            "every other figure was measured when the evidence was written.",
        ),
    )
