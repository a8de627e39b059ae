"""The table with one column a target."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from diffoundry.reporting.gathering import Report
from diffoundry.reporting.page import write_page
from diffoundry.reporting.pictures import Pictures
from diffoundry.reporting.targets import targets_section
from diffoundry.types import CheckResult, ParityResult
from tests.core.reporting.browser import probe

OTHER = "coreml-fp16"


def with_second(report: Report) -> Report:
    """The report with a second variant, which a stand-in ran: it shares engines and pictures."""
    (first,) = report.bundle.manifest.variants
    second = first.model_copy(update={"name": OTHER, "runtime": "coreml_native"})
    manifest = report.bundle.manifest.model_copy(update={"variants": (first, second)})
    (evidence,) = report.evidence
    deferred = CheckResult("device", "coreml_native", "deferred",
                           values={"stand_in": "mil_reference"})  # fmt: skip
    own = evidence.variants[first.name]
    lent = own.model_copy(
        update={"results": (ParityResult("unet", (deferred,)), *own.results), "bench": None}
    )
    pictures = Pictures(
        tuple(
            dataclasses.replace(
                pair,
                engines=(*pair.engines, dataclasses.replace(pair.engines[0], variant=OTHER)),
            )
            for pair in report.pictures.pairs
        ),
        {},
        {OTHER: "not on the <device>"},
    )
    return dataclasses.replace(
        report,
        bundle=dataclasses.replace(report.bundle, manifest=manifest),
        evidence=(evidence.model_copy(update={"variants": {first.name: own, OTHER: lent}}),),
        pictures=pictures,
        verdict=dataclasses.replace(
            report.verdict, variants={**report.verdict.variants, OTHER: "deferred"}
        ),
    )


def rows_of(text: str) -> dict[str, list[str]]:
    found = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL):
        cells = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        found[cells[0]] = cells[1:]
    return found


def test_a_single_variant_needs_no_such_table(report: Report) -> None:
    assert targets_section(report) is None


def test_each_variant_has_its_column_with_its_own_figures(report: Report) -> None:
    section = targets_section(with_second(report))
    assert section is not None
    rows = rows_of(section)
    assert rows[""] == ["onnx-cpu-fp32", OTHER]
    assert rows["checked with"] == ["onnx_session", "mil_reference"]
    assert [cell[1:] for cell in rows["verdict"]] == ["passed", "deferred"]
    assert rows["a picture takes"] == ["20 ms", "—"]
    assert rows["worst picture"] == ["9.0 dB", "9.0 dB"]
    assert re.fullmatch(r"\d\.\de[+-]\d\d", rows["worst max abs"][0])
    assert section.count('class="pixelated"') == 2


def test_the_page_says_who_stood_in_and_fits_a_phone(report: Report, tmp_path: Path) -> None:
    text = write_page(with_second(report))
    assert "not on the &lt;device&gt;" in text
    found = probe(text, 375, tmp_path)
    assert found["page_width"] <= 375
    assert "targets" in {name for name, *_ in found["sections"]}
