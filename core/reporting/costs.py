"""Sizes, what the build cost, and speed."""

from __future__ import annotations

from diffoundry.artifacts.evidence import Evidence, StageMeasure
from diffoundry.reporting.charts import bar
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Html, el, section, table


def sizes_section(report: Report) -> Html:
    """A bar for each component of each variant, and their sums."""
    variants = report.bundle.manifest.variants
    names = list(dict.fromkeys(name for v in variants for name in v.engines))
    sizes = {v.name: {n: e.size_bytes for n, e in v.engines.items()} for v in variants}
    totals = {name: sum(found.values()) for name, found in sizes.items()}
    largest = max(totals.values())
    body = [_size_rows(name, {v: s[name] for v, s in sizes.items() if name in s}, largest)
            for name in names]  # fmt: skip
    body.append(_size_rows("together", totals, largest, kind="total"))
    flat = [one for rows in body for one in rows]
    whole = table(("component", "variant", "", "size"), flat, "Size of the engines", "bars", (3,))
    return section("sizes", "Sizes", whole)


def _size_rows(name: str, sizes: dict[str, int], largest: int, kind: str = "") -> list[Html]:
    rows = []
    for number, (variant, size) in enumerate(sizes.items()):
        first = el("th", name, scope="rowgroup", rowspan=len(sizes)) if not number else None
        cells = [
            el("td", variant, class_="who"),
            el("td", bar(size, largest, number + 1), class_="barcell"),
            el("td", megabytes(size), class_="number"),
        ]
        mark = " ".join(filter(None, (kind, "" if number else "first")))
        rows.append(el("tr", first, cells, class_=mark or None))
    return rows


def stages_section(report: Report) -> Html:
    """Seconds and peak memory of every stage, as measured where it ran."""
    parts = [_stages_of(one) for one in report.evidence if one.stages]
    if not parts:
        parts = [el("p", "No evidence of a build came with this bundle.")]
    return section("stages", "What the build cost", parts)


def _stages_of(evidence: Evidence) -> Html:
    stages = evidence.stages
    seconds = max(stage.seconds for stage in stages)
    memory = max(stage.peak_memory_bytes for stage in stages)
    body = [_stage_row(stage, seconds, memory) for stage in stages]
    peak = max(stages, key=lambda stage: stage.peak_memory_bytes)
    total = sum(stage.seconds for stage in stages)
    words = (
        f"On {evidence.host.name}: {duration(total)} of work in {len(stages)} stages, each in a "
        f"process of its own; the largest took {megabytes(peak.peak_memory_bytes)}. A stage that "
        "was in the store keeps the figures of the build that ran it."
    )
    head = ("stage", "component", "", "seconds", "", "peak memory")
    caption = f"Stages of the build on {evidence.host.name}"
    return el("div", el("p", words), table(head, body, caption, "bars stages", (3, 5)))


def _stage_row(stage: StageMeasure, seconds: float, memory: int) -> Html:
    return el(
        "tr",
        el("th", stage.stage.replace("_", " "), scope="row"),
        el("td", stage.component or "whole pipeline", class_="who"),
        el("td", bar(stage.seconds, seconds, 0), class_="barcell"),
        el("td", f"{stage.seconds:.1f} s", class_="number"),
        el("td", bar(stage.peak_memory_bytes, memory, 1), class_="barcell"),
        el("td", megabytes(stage.peak_memory_bytes), class_="number"),
        class_="first",
    )


def megabytes(size_bytes: float) -> str:
    """Bytes in MB of 10^6, as everywhere in Diffoundry."""
    size = size_bytes / 1e6
    return f"{size:,.{2 if size < 10 else 1 if size < 100 else 0}f} MB"


def duration(seconds: float) -> str:
    """Seconds, from two minutes on in minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"
