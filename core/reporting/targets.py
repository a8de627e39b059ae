"""Every target beside the others: one column a variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.reporting.costs import megabytes
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Child, Html, code, el, row, section, status, table
from diffoundry.reporting.pictures import EnginePicture, Pictures, data_uri
from diffoundry.reporting.speed import benches
from diffoundry.types import CheckResult

Cell = Callable[[Report, VariantRecord], Child]
NONE = "—"


def targets_section(report: Report) -> Html | None:
    """Picture, PSNR, max_abs, size and milliseconds of each variant; None for a single one."""
    variants = report.bundle.manifest.variants
    if len(variants) < 2:
        return None
    body = [
        row(name, *(cell(report, variant) for variant in variants), kind="first")
        for name, cell in ROWS
    ]
    head = ("", *(code(variant.name) for variant in variants))
    intro = el(
        "p",
        "The first prompt’s picture from the same noise, and the worst figures of every check. "
        "Milliseconds come from ",
        code("diffoundry bench --save"),
        ".",
    )
    return section("targets", "Targets", intro, table(head, body, "One column a target", "targets"))


def _picture(report: Report, variant: VariantRecord) -> Child:
    one = next(iter(_engines(report.pictures, variant.name)), None)
    if one is None or one.image is None:
        return NONE
    height, width = one.image.shape[:2]
    return el("img", src=data_uri(one.image), alt=f"The first picture of {variant.name}",
              width=width, height=height, class_="pixelated")  # fmt: skip


def _engines(pictures: Pictures, variant: str) -> list[EnginePicture]:
    return [one for pair in pictures.pairs for one in pair.engines if one.variant == variant]


def _verdict(report: Report, variant: VariantRecord) -> Child:
    return status(report.verdict.variants[variant.name])


def _run_by(report: Report, variant: VariantRecord) -> Child:
    by = {check.values["stand_in"] for check in _checks(report, variant, ("device",))
          if "stand_in" in check.values}  # fmt: skip
    return ", ".join(sorted(map(str, by))) or variant.runtime


def _psnr(report: Report, variant: VariantRecord) -> Child:
    found = [
        one.psnr_db for one in _engines(report.pictures, variant.name) if one.psnr_db is not None
    ]
    return f"{min(found):.1f} dB" if found else NONE


def _max_abs(report: Report, variant: VariantRecord) -> Child:
    levels = ("call", "trajectory")
    found = [c.measure.max_abs for c in _checks(report, variant, levels) if c.measure is not None]
    return f"{max(found):.1e}" if found else NONE


def _size(report: Report, variant: VariantRecord) -> Child:
    return megabytes(sum(engine.size_bytes for engine in variant.engines.values()))


def _milliseconds(report: Report, variant: VariantRecord) -> Child:
    medians = [
        median
        for evidence in report.evidence
        for one in benches(evidence)
        if one.name == variant.name
        and (median := one.number("picture_seconds", "median")) is not None
    ]
    return f"{1000 * min(medians):.3g} ms" if medians else NONE


def _checks(report: Report, variant: VariantRecord, levels: Sequence[str]) -> list[CheckResult]:
    return [
        check
        for evidence in report.evidence
        if (measured := evidence.variants.get(variant.name)) is not None
        for result in measured.results
        for check in result.checks
        if check.level in levels
    ]


ROWS: tuple[tuple[str, Cell], ...] = (
    ("picture", _picture),
    ("verdict", _verdict),
    ("checked with", _run_by),
    ("worst picture", _psnr),
    ("worst max abs", _max_abs),
    ("size", _size),
    ("a picture takes", _milliseconds),
)
