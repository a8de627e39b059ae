"""Lines over two logarithmic axes, in panels side by side, as an SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from diffoundry.embedded.sweep_chart import STYLE

COLOURS = ("#2f6fb5", "#b5632f", "#3f8f4f", "#8a4fb0")
WIDTH, HEIGHT = 960, 408
NAMES, TOP, BOTTOM, LEFT, RIGHT, GAP = 60, 132, 324, 64, 16, 72
"""NAMES: height of a panel's name; what its lines are stands between that and TOP."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """`lines`: name -> (x, y) points, x growing. A dashed line from each first point shows what
    growing as fast as x would be."""

    title: str
    x_name: str
    lines: Mapping[str, Sequence[Point]]
    unit: str


def draw(panels: Sequence[Panel], title: str, note: str) -> str:
    """The whole SVG; each panel has scales of its own."""
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    parts = [
        f'<rect class="panel" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        _text(title, 20, 30, "title"),
        _text(note, 20, HEIGHT - 14, ""),
    ]
    for number, panel in enumerate(panels):
        left = LEFT + number * (width + GAP)
        parts += _panel(panel, left, left + width)
    words = "; ".join(
        f"{panel.title}, {name}: " + ", ".join(f"{x:g} {y:g} {panel.unit}" for x, y in points)
        for panel in panels
        for name, points in panel.lines.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">\n<title>{escape(title)}</title>'
        f"<desc>{escape(words)}</desc>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel, left: float, right: float) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    x_low, x_high = _decades([x for x, _ in points])
    y_low, y_high = _decades([y for _, y in points])

    def place(point: Point) -> Point:
        across = (math.log10(point[0]) - x_low) / (x_high - x_low)
        up = (math.log10(point[1]) - y_low) / (y_high - y_low)
        return left + (right - left) * across, BOTTOM - (BOTTOM - TOP) * up

    parts = [_text(panel.title, left, NAMES, "name")]
    for power in _ticks(y_low, y_high):
        _, y = place((10**x_low, power))
        parts.append(
            f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(f"{_plain(power)}", left - 8, y + 4, "", "end"))
    for power in _ticks(x_low, x_high):
        x, _ = place((power, 10**y_low))
        parts.append(_text(_plain(power), x, BOTTOM + 18, "", "middle"))
    parts.append(_text(panel.x_name, (left + right) / 2, BOTTOM + 36, "", "middle"))
    top = 10**y_high
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        (x0, y0), (x1, _) = line[0], line[-1]
        end = min(x1, x0 * top / y0)
        (ax, ay), (bx, by) = place((x0, y0)), place((end, y0 * end / x0))
        parts.append(f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}" '
                     f'stroke="{colour}" stroke-dasharray="3 4" opacity="0.6"/>')  # fmt: skip
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in map(place, line):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<rect x="{left + 6:.1f}" y="{NAMES + 14 + 18 * number:.1f}" width="12" '
                     f'height="4" fill="{colour}"/>')  # fmt: skip
        parts.append(_text(name, left + 24, NAMES + 20 + 18 * number, ""))
    return parts


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms of a scale's ends: a third of a decade around the values."""
    return math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.3


def _ticks(low: float, high: float) -> list[float]:
    steps = (1, 3) if high - low < 2.2 else (1,)
    found = [s * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    return [value for value in found if low <= math.log10(value) <= high]


def _plain(value: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _text(words: str, x: float, y: float, kind: str, anchor: str = "start") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{name} text-anchor="{anchor}">{escape(words)}</text>'
