"""The table of what compression bought: from the build, from a bench, or not measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts.content import CompressionContent
from diffoundry.artifacts.evidence import VariantEvidence, new_evidence
from diffoundry.artifacts.gain import Gain, VariantGain
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.reporting.gathering import Report, as_document, gather
from diffoundry.reporting.page import write_page
from diffoundry.reporting.paying import paying_section
from tests.artifacts.tiny_bundle import write_files
from tests.artifacts.working_bundle import VARIANT, working_content
from tests.core.reporting.browser import probe

SMALL = "onnx-cpu-int8"
GAIN = Gain(
    pays=False,
    speed=0.8,
    p10=0.7,
    p90=0.9,
    rounds=3,
    seconds=0.01,
    baseline_seconds=0.008,
    size_bytes=1_000_000,
    baseline_size_bytes=4_000_000,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """An fp32 variant, and a compressed one: U-Net pruned and quantized. No evidence."""
    folder = tmp_path_factory.mktemp("paying")
    records = write_files(folder / "records", {
        "plan.json": json.dumps({"layers": [{"scheme": "static"}, {"scheme": "<float>"}]}),
        "prune.json": json.dumps({"parameters": {"before": 2_000_000, "after": 1_500_000}}),
    })  # fmt: skip
    content = working_content(folder / "parts")
    (full,) = content.variants
    record = CompressionContent(records / "plan.json", (records / "prune.json",))
    small = dataclasses.replace(full, name=SMALL, precision="int8", compression={"unet": record})
    both = dataclasses.replace(content, variants=(full, small))
    return gather(write_bundle(folder / "bundle", both).bundle.path)


def with_evidence(report: Report, **fields: Any) -> Report:
    evidence = new_evidence(report.bundle.digest, {SMALL: VariantEvidence(**fields)})
    return dataclasses.replace(report, evidence=(evidence,))


def rows(report: Report) -> dict[str, list[str]]:
    """Component -> cells, tags left out; "" -> what stands under the variant's name."""
    section = paying_section(report)
    assert section is not None
    found = {}
    for text in re.findall(r"<tr[^>]*>(.*?)</tr>", section, re.DOTALL)[1:]:
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text)
        words = [re.sub(r"<[^>]+>", " ", cell).strip() for cell in cells]
        if len(words) == 8:
            found[""] = [words.pop(0)]
        found[words[0]] = words[1:]
    return found


def test_a_bundle_without_compressed_variants_has_no_such_part(report: Report) -> None:
    assert paying_section(report) is None


def test_records_stand_there_before_anybody_measured(plain: Report) -> None:
    found = rows(plain)
    assert found["unet"][3:] == ["2 → 1.5 M (−25 %)", "—", "1 &lt;float&gt;, 1 static"]
    assert found["unet"][0] == "—" and "not measured" in found[""][0]


def test_the_builds_figures_stand_before_and_after(plain: Report) -> None:
    unet = GAIN.model_copy(update={"integer_layers": 1, "planned_layers": 2})
    gain = VariantGain(
        against="the <fp32>", components={"unet": unet}, picture=GAIN, unchanged=("vae_decoder",)
    )
    found = rows(with_evidence(plain, gain=gain))
    assert "against the &lt;fp32&gt;" in found[""][0]
    assert found["unet"][0].startswith("DOES NOT PAY 0.80 ×")
    assert found["unet"][1:3] == ["8 → 10 ms", "4.00 MB → 1.00 MB"]
    assert found["a picture"][1] == "8 → 10 ms"
    assert "ONLY 1 of 2 planned layers in integer kernels" in found["unet"][5]
    assert found["text encoder"][0] == "—" and found["vae decoder"][0] == "the same engine"


def test_a_benchs_figures_come_before_the_builds(plain: Report) -> None:
    better = GAIN.model_copy(update={"pays": True, "speed": 2.0}).model_dump()
    bench = {
        "picture_seconds": {"median": 0.02},
        "components": {
            "unet": {"gain": better},
            "vae_decoder": {"gain": {"of": "a newer version"}},
        },
        "verdict": {"against": VARIANT, "gain": better},
    }
    found = rows(with_evidence(plain, bench=bench, gain=VariantGain(picture=GAIN)))
    assert found["unet"][0].startswith("pays 2.00 ×") and f"against {VARIANT}" in found[""][0]
    assert found["vae decoder"][0] == "—"


def test_a_bench_against_pytorch_does_not_hide_that_fp32_was_faster(plain: Report) -> None:
    better = GAIN.model_copy(update={"pays": True, "speed": 30.0}).model_dump()
    bench = {
        "components": {"unet": {"gain": better}},
        "verdict": {"against": "PyTorch eager", "gain": better},
    }
    own = VariantGain(against="fp32 engines", components={"unet": GAIN}, picture=GAIN)
    found = rows(with_evidence(plain, bench=bench, gain=own))
    assert found["unet"][0].startswith("DOES NOT PAY 0.80 ×")
    assert rows(with_evidence(plain, bench=bench))["unet"][0].startswith("pays 30.00 ×")


def test_what_is_deferred_says_so(plain: Report) -> None:
    gain = VariantGain(deferred="coreml_native is not on this host")
    assert "deferred: coreml_native" in rows(with_evidence(plain, gain=gain))[""][0]


def test_the_page_shows_it_and_the_document_has_the_counts(plain: Report, tmp_path: Path) -> None:
    gain = VariantGain(against="fp32", components={"unet": GAIN}, picture=GAIN)
    shown = with_evidence(plain, gain=gain)
    found = probe(write_page(shown), 375, tmp_path)
    assert "paying" in {name for name, *_ in found["sections"]}
    assert found["page_width"] <= 375
    document = json.loads(json.dumps(as_document(shown)))
    assert document["compression"][SMALL]["unet"]["parameters"]["after"] == 1_500_000
    assert document["evidence"][0]["variants"][SMALL]["gain"]["picture"]["speed"] == 0.8
