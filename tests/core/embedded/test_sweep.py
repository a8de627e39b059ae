"""The sweep over steps and guidance: never the evaluation's pairs, right figures, a whole chart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from diffoundry.embedded import prompts, sweep
from diffoundry.embedded.prompts import SPLIT_SIZES, PromptSeed, load_split
from diffoundry.embedded.scenes import SIDE, draw, parse
from diffoundry.embedded.sweep import (
    DEFAULT_STEPS,
    GUIDANCES,
    STEPS,
    Point,
    chart,
    measure,
    sweep_pairs,
    wilson,
)

SVG = "{http://www.w3.org/2000/svg}"


def paint(pairs: Sequence[PromptSeed], steps: int, guidance: float) -> np.ndarray:
    """Right with many steps, nothing with one; two in ten wrong at guidance 7."""
    pictures = []
    for number, pair in enumerate(pairs):
        shown = pairs[number - 1].prompt if guidance == 7 and number % 5 == 0 else pair.prompt
        scene = draw(parse(shown), np.random.default_rng(pair.seed))
        pictures.append(np.zeros((SIDE, SIDE, 3), np.uint8) if steps == 1 else scene)
    return np.stack(pictures)


def test_no_pair_and_no_seed_of_the_evaluation_is_ever_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def watched(name: str) -> tuple[PromptSeed, ...]:
        asked.append(name)
        return load_split(name)

    monkeypatch.setattr(sweep, "load_split", watched)
    monkeypatch.setattr(prompts, "load_split", watched)
    monkeypatch.setattr(sweep, "recognise", lambda image: None)
    used: list[PromptSeed] = []

    def watch(pairs: Sequence[PromptSeed], steps: int, guidance: float) -> np.ndarray:
        used.extend(pairs)
        return np.zeros((len(pairs), SIDE, SIDE, 3), np.uint8)

    sweep.sweep(watch, sweep_pairs(100))
    assert asked == ["tuning"]
    for split in ("evaluation", "calibration"):
        assert not {pair.seed for pair in used} & {pair.seed for pair in load_split(split)}
    committed = {pair.seed for name in SPLIT_SIZES for pair in load_split(name)}
    assert max(committed) < sweep.FIRST_FRESH


def test_the_pairs_are_the_tuning_split_and_then_fresh_ones() -> None:
    pairs = sweep_pairs(100)
    tuning = load_split("tuning")
    assert pairs[: len(tuning)] == tuning and pairs == sweep_pairs(100)
    assert len({pair.seed for pair in pairs}) == 100
    assert all(pair.seed >= 2**31 for pair in pairs[len(tuning) :])
    assert sweep_pairs(5) == tuning[:5]


def test_unreadable_and_wrong_pictures_both_count_as_wrong() -> None:
    pairs = sweep_pairs(20)
    nothing = measure(paint, pairs, 1, 3.0)
    assert (nothing.right, nothing.unreadable, nothing.accuracy) == (0, 20, 0.0)
    some = measure(paint, pairs, 4, 7.0)
    assert (some.right, some.unreadable) == (16, 0) and some.low < 0.8 < some.high


def test_the_interval_is_wilsons() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                   (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_every_setting_is_measured_once() -> None:
    points = sweep.sweep(paint, sweep_pairs(5))
    settings = [(point.steps, point.guidance) for point in points]
    assert len(set(settings)) == len(settings) == len(STEPS) + len(GUIDANCES) - 1
    assert {steps for steps, guidance in settings if guidance == 3} == set(STEPS)
    assert {guidance for steps, guidance in settings if steps == DEFAULT_STEPS} == set(GUIDANCES)


def points(low: float) -> list[Point]:
    """A whole sweep whose shares rise evenly from `low` to 1."""
    settings = [(s, 3.0) for s in STEPS] + [(4, g) for g in GUIDANCES if g != 3]
    shares = np.linspace(low, 1, len(settings))
    return [
        Point(s, g, 100, round(100 * a), 0, float(a), *wilson(round(100 * a), 100))
        for (s, g), a in zip(settings, shares, strict=True)
    ]


@pytest.mark.parametrize("low", [0.0, 0.31, 0.87, 1.0])
def test_the_chart_holds_every_point_inside_its_frame(low: float) -> None:
    root = ElementTree.fromstring(chart(points(low)))
    dots = [one for one in root.iter(f"{SVG}circle") if one.get("class") == "dot"]
    assert len(dots) == len(STEPS) + len(GUIDANCES)
    _, _, width, height = (float(one) for one in root.get("viewBox", "").split())
    for line in root.iter(f"{SVG}line"):
        for key in ("x1", "x2", "y1", "y2"):
            assert 0 <= float(line.get(key, "-1")) <= (width if key[0] == "x" else height)
    rings = [one for one in root.iter(f"{SVG}circle") if one.get("class") == "ring"]
    assert len(rings) == 2
    style = root.find(f"{SVG}style")
    assert style is not None and "prefers-color-scheme: dark" in (style.text or "")


def test_higher_is_higher_and_more_steps_stand_further_right() -> None:
    root = ElementTree.fromstring(chart(points(0.4)))
    dots = [one for one in root.iter(f"{SVG}circle") if one.get("class") == "dot"]
    steps = dots[: len(STEPS)]
    xs, ys = ([float(one.get(key, "")) for one in steps] for key in ("cx", "cy"))
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True)


def test_the_command_writes_data_and_chart_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "STEPS", (4,))
    monkeypatch.setattr(sweep, "GUIDANCES", (3.0,))
    out = tmp_path / "made" / "guidance-steps"
    sweep.main(["--out", str(out), "--pairs", "3"])
    document = json.loads(out.with_suffix(".json").read_text())
    (point,) = document["points"]
    assert point["pairs"] == 3 and 0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1
    assert document["model_digest"].startswith("sha256:")
    svg = out.with_suffix(".svg").read_text()
    assert str(tmp_path) not in svg + json.dumps(document)
    ElementTree.fromstring(svg)
    assert "4 steps, guidance 3" in capsys.readouterr().out
