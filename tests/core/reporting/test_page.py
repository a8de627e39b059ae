"""The page is whole, asks for nothing, escapes what it shows, and holds in a real browser."""

from __future__ import annotations

import itertools
import re
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from diffoundry.reporting.gathering import Report, gather
from diffoundry.reporting.page import SECTIONS, write_page
from tests.core.reporting.browser import chromium, dump_dom, probe, screenshot
from tests.core.reporting.conftest import HOSTILE

PHONE_PX = 375
DARK = "--blink-settings=preferredColorScheme=0"


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return write_page(report)


@pytest.fixture(scope="module")
def page(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_same_bundle_gives_the_same_page(bundle: Path) -> None:
    assert write_page(gather(bundle)) == write_page(gather(bundle))


def test_nothing_is_asked_for_and_no_script_runs(text: str) -> None:
    assert not re.search(r"https?:|[\"'(]//", text, re.IGNORECASE)
    assert set(re.findall(r'\b(?:src|href|srcset|data|action)="([^":]*[:#]?)', text)) <= {
        "data:",
        *(f"#{anchor}" for anchor, *_ in SECTIONS),
    } | {"#"}
    assert not re.search(r"<(script|link|object|iframe|base|form)\b|url\(|@import", text)
    assert "default-src &#x27;none&#x27;" in text


def test_a_hostile_prompt_stays_text(page: Path, tmp_path: Path) -> None:
    assert "&lt;script&gt;alert(" in page.read_text("utf-8")
    dom = dump_dom(page, tmp_path)
    assert "<script" not in dom and '<img src="x"' not in dom
    (shown,) = re.findall(r"<h3>(&lt;/style.*?)</h3>", dom)
    assert shown == HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_every_part_is_there_in_the_browser(text: str, tmp_path: Path) -> None:
    found = probe(text, 1200, tmp_path)
    sections = {name: (title, height) for name, title, height in found["sections"]}
    assert set(sections) == {anchor for anchor, *_ in SECTIONS} - {"notes", "targets", "paying"}
    assert all(title and height > 60 for title, height in sections.values())
    assert len(found["pictures"]) == 3 * 3
    assert all(alt and width > 0 for alt, width in found["pictures"])
    assert max(found["bars"]) > 100
    assert found["requests"] == []
    levels = found["headings"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_a_phone_never_scrolls_sideways(text: str, tmp_path: Path) -> None:
    found = probe(text, PHONE_PX, tmp_path)
    assert found["shown_width"] == PHONE_PX
    assert found["page_width"] <= PHONE_PX


def test_a_missing_browser_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        chromium()


def test_light_and_dark_are_drawn(page: Path, tmp_path: Path) -> None:
    for more, dark in (((), False), ((DARK,), True)):
        with Image.open(screenshot(page, tmp_path, *more)) as picture:
            shown = picture.convert("L")
            assert shown.size == (1200, 900)
            assert (shown.getpixel((5, 5)) < 60) == dark
            assert len(shown.getcolors(256) or range(257)) > 40


def test_text_stands_out_from_its_ground_in_both_themes() -> None:
    style = resources.files("diffoundry.reporting").joinpath("style.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        pairs = [(ink, ground) for ink in ("text", "muted", "link", "good", "bad", "wait", "note")
                 for ground in ("page", "panel")]  # fmt: skip
        pairs += [(tone, f"{tone}-tint") for tone in ("good", "bad", "wait")]
        pairs += [("text", f"{tone}-tint") for tone in ("good", "bad", "wait")]
        for ink, ground in pairs:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio"."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_metrics_of_a_bench_stand_in_it_where_somebody_measured_them(text: str) -> None:
    assert "500 pictures, 4 steps against &lt;PyTorch&gt; eager" in text
    for words in ("CLIP score", "27.12", "-0.25", "LPIPS", "0.0123"):
        assert words in text
    assert ">worst</th>" not in text and ">FID</th>" not in text


def test_what_was_measured_stands_in_it(text: str) -> None:
    assert "onnx-gpu" in text and "needs a &lt;GPU&gt;" in text
    assert "Unreadable: 0 of PyTorch, 1 of onnx-cpu-fp32" in text
    assert "2.50 × the speed of &lt;PyTorch&gt;" in text and "20 ms" in text
    assert "not a number" not in text
    assert "✓</span>passed" in text
