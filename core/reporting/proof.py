"""The tables of the report: variants, parity, what is deferred, lineage, notes, tools."""

from __future__ import annotations

from collections.abc import Sequence

from diffoundry.artifacts.evidence import Evidence
from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.parity.table import COLUMNS, condensed_rows, messages, rows
from diffoundry.reporting.costs import megabytes
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Html, code, el, join, row, section, shorten, status, table
from diffoundry.types import ParityResult

FLOOR = (
    "Every figure compares an engine with the PyTorch original on recorded inputs. The floor is "
    "how far rounding alone takes a lossless engine; a limit on max abs that follows the values’ "
    "size is never below a multiple of it. “Nothing dropped” exchanges one input at a time: an "
    "engine must change as the original does."
)


def variants_section(report: Report) -> Html:
    """One row a variant: what it is, what it needs, how it was judged."""
    body = [_variant_row(one, report) for one in report.bundle.manifest.variants]
    head = ("variant", "verdict", "precision", "runtime", "device", "shapes", "size", "needs")
    return section("variants", "Variants", table(head, body, "Variants of this bundle", "plain"))


def _variant_row(variant: VariantRecord, report: Report) -> Html:
    needs = ", ".join(f"{r.distribution} ≥ {r.at_least}" for r in variant.requires)
    size = sum(engine.size_bytes for engine in variant.engines.values())
    return row(
        code(variant.name),
        status(report.verdict.variants[variant.name]),
        variant.precision,
        variant.runtime.replace("_", " "),
        variant.device,
        variant.shape_policy.kind,
        megabytes(size),
        needs or "nothing more",
    )


def parity_section(report: Report) -> Html:
    """A table for each variant and host; every single check waits folded below it."""
    parts = [
        _parity_of(name, one, variant.results)
        for one in report.evidence
        for name, variant in one.variants.items()
        if variant.results
    ]
    if not parts:
        command = code("diffoundry verify BUNDLE --complete")
        parts = [el("p", "Nothing was measured yet: ", command, " does it.", class_="notice")]
    return section("parity", "Parity with the original", el("p", FLOOR), parts)


def _parity_of(name: str, evidence: Evidence, results: Sequence[ParityResult]) -> Html:
    title = f"{name}, measured on {evidence.host.name}"
    short, every = condensed_rows(results), rows(results)
    folded = None
    if len(every) > len(short):
        folded = el(
            "details",
            el("summary", f"All {len(every)} checks, one a line"),
            _parity_table(every, f"All checks of {title}"),
        )
    said = [
        el("li", line, class_=line.partition(":")[0])
        for line in sorted(messages(results), key=lambda one: not one.startswith("failed"))
    ]
    return el(
        "div",
        el("h3", code(name), f" on {evidence.host.name}"),
        _parity_table(short, f"Parity of {title}"),
        el("ul", said, class_="messages") if said else None,
        folded,
    )


def _parity_table(cells: Sequence[tuple[str, ...]], caption: str) -> Html:
    body = []
    before = None
    for one in cells:
        kind = f"is-{one[-1]}" if one[1] == before else f"is-{one[-1]} group"
        before = one[1]
        body.append(
            row(_words(one[0]), *map(_words, one[1:-1]), status(one[-1]), kind=kind),
        )
    return table(COLUMNS, body, caption, kind="parity")


def _words(text: str) -> Html:
    """A cell whose parts, between commas, stay on one line each."""
    parts = text.replace("_", " ").split(", ")
    last = len(parts) - 1
    return join(
        [
            join(el("span", one, "," if number < last else None, class_="whole"), " ")
            for number, one in enumerate(parts)
        ]
        if last
        else text.replace("_", " ")
    )


def deferred_section(report: Report) -> Html:
    """Checks that no host could run yet, with why."""
    done = {
        (name, result.subject)
        for one in report.evidence
        for name, variant in one.variants.items()
        for result in variant.results
        if result.passed
    }
    lines = [
        el("li", code(name), f" on {one.host.name}, {text.removeprefix('deferred: ')}")
        for one in report.evidence
        for name, variant in one.variants.items()
        for result in variant.results
        if (name, result.subject) not in done
        for text in messages([result])
        if text.startswith("deferred: ")
    ]
    if lines:
        command = code("diffoundry verify BUNDLE --complete")
        told = el("p", "These need another host; ", command, " there adds what it measures.")
        shown = el("ul", lines, class_="messages")
        return section("deferred", "What is deferred", told, shown)
    none = "Nothing: every check that this bundle asks for has run."
    if not report.evidence:
        none = "No check of this bundle has run anywhere yet."
    return section("deferred", "What is deferred", el("p", none))


def lineage_section(report: Report) -> Html:
    """Engine by engine: the stages that made it, oldest first, with the start of their keys."""
    names = {s.key: s.stage for one in report.evidence for s in one.stages if s.key}
    body = []
    for variant in report.bundle.manifest.variants:
        for component, engine in variant.engines.items():
            chain = [
                el("li", names.get(key, "stage").replace("_", " "), " ", shorten(key, 8))
                for key in engine.lineage
            ]
            body.append(
                row(
                    component,
                    code(variant.name),
                    el("ol", chain, class_="chain"),
                    shorten(engine.digest, 8),
                )
            )
    source = report.bundle.manifest.model.source_digest
    intro = el("p", "From the model ", shorten(source), ". A stage’s key covers its inputs, "
               "options, code and tools: the same key is the same output.")  # fmt: skip
    head = ("component", "variant", "made by", "engine")
    return section("lineage", "Lineage", intro, table(head, body, "How each engine was made"))


def notes_section(report: Report) -> Html | None:
    """What the build left out, and what it says beside."""
    manifest = report.bundle.manifest
    lines = dict.fromkeys(
        (
            *(f"left out: {name}" for name in manifest.model.left_out),
            *manifest.notes,
            *(f"{v.name}: {note}" for v in manifest.variants for note in v.notes),
            *report.evidence_notes,
        )
    )
    if not lines:
        return None
    return section("notes", "Notes", el("ul", [el("li", line) for line in lines]))


def tools_section(report: Report) -> Html:
    """Versions that made the bundle, and the hosts that measured it."""
    hosts = [_host_row(one) for one in report.evidence]
    head = ("host", "system", "processor", "cores", "Python", "measured")
    where = table(head, hosts, "Hosts that measured this bundle", numbers=(3,))
    versions = {"built with": dict(report.bundle.manifest.tools)}
    versions |= {one.host.name: dict(one.host.packages) for one in report.evidence}
    names = sorted({name for found in versions.values() for name in found})
    body = [row(name, *(found.get(name, "—") for found in versions.values())) for name in names]
    which = table(("package", *versions), body, "Versions of tools")
    return section("tools", "Hosts and tools", where if hosts else None, which)


def _host_row(evidence: Evidence) -> Html:
    host = evidence.host
    system = f"{host.system}, {host.machine}"
    when = evidence.updated.replace("T", " ").replace("+00:00", " UTC")
    return row(host.name, system, host.processor, str(host.cores), host.python, when, numbers=(3,))
