"""A small SVG of shares with their intervals, in panels side by side; light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# The colours of the report (core/reporting/style.css): this file has to stand alone.
STYLE = """
  :root { --panel: #ffffff; --line: #dfe2e6; --text: #1a1e24; --muted: #57606b; --s: #2f6fb5; }
  @media (prefers-color-scheme: dark) {
    :root { --panel: #181c22; --line: #2e343d; --text: #e7eaee; --muted: #a3adb9; --s: #5d9fe4; }
  }
  text { font: 13px ui-sans-serif, system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
         fill: var(--muted); font-variant-numeric: tabular-nums; }
  .title { font-size: 16px; font-weight: 650; fill: var(--text); }
  .name { font-weight: 600; fill: var(--text); }
  .value { fill: var(--text); }
  .panel { fill: var(--panel); }
  .grid { stroke: var(--line); }
  .line { fill: none; stroke: var(--s); stroke-width: 2; }
  .bar { stroke: var(--s); stroke-width: 1.5; opacity: 0.75; }
  .dot { fill: var(--s); }
  .ring { fill: none; stroke: var(--s); stroke-width: 1.5; }
"""
WIDTH, HEIGHT = 760, 340
TOP, BOTTOM, LEFT, RIGHT, GAP = 84, 278, 52, 16, 44
CAP, DOT, RING = 4.0, 4.0, 8.0


@dataclass(frozen=True)
class Panel:
    """One panel: (what is written below it, share, low, high), all in 0..1, at even steps.

    `chosen`: the point that gets a ring.
    """

    name: str
    points: Sequence[tuple[str, float, float, float]]
    chosen: str


def draw_panels(panels: Sequence[Panel], title: str, note: str) -> str:
    """The whole SVG. All panels share one scale, which begins below every interval."""
    floor = _floor(low for panel in panels for _, _, low, _ in panel.points)
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    parts = [
        _tag("rect", class_="panel", width=WIDTH, height=HEIGHT, rx=8),
        _text(title, 20, 30, "title"),
        _text(note, 20, 322, ""),
    ]
    for number, panel in enumerate(panels):
        left = LEFT + number * (width + GAP)
        parts.append(_panel(panel, left, left + width, floor, labelled=number == 0))
    words = "; ".join(
        f"{panel.name}: " + ", ".join(f"{x} {share:.0%}" for x, share, _, _ in panel.points)
        for panel in panels
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">\n'
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc>\n"
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel, left: float, right: float, floor: float, labelled: bool) -> str:
    def height(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (share - floor) / (1 - floor)

    parts = [_text(panel.name, left, TOP - 24, "name")]
    for tick in _ticks(floor):
        y = height(tick)
        parts.append(_tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        if labelled:
            parts.append(_text(f"{tick:.0%}", left - 8, y + 4, "", "end"))
    step = (right - left) / len(panel.points)
    places = [left + step * (number + 0.5) for number in range(len(panel.points))]
    line = " ".join(
        f"{x:.1f},{height(point[1]):.1f}" for x, point in zip(places, panel.points, strict=True)
    )
    parts.append(_tag("polyline", class_="line", points=line))
    for x, (name, share, low, high) in zip(places, panel.points, strict=True):
        ends = height(low), height(high)
        parts.append(_tag("line", class_="bar", x1=x, x2=x, y1=ends[0], y2=ends[1]))
        parts += [_tag("line", class_="bar", x1=x - CAP, x2=x + CAP, y1=y, y2=y) for y in ends]
        parts.append(_tag("circle", class_="dot", cx=x, cy=height(share), r=DOT))
        if name == panel.chosen:
            parts.append(_tag("circle", class_="ring", cx=x, cy=height(share), r=RING))
        # Beside the point where it stays clear of the bar.
        parts.append(_text(f"{100 * share:.0f}", x + 9, height(share) + 16, "value"))
        parts.append(_text(name, x, BOTTOM + 18, "", "middle"))
    return "\n".join(parts)


def _floor(lows: Iterable[float]) -> float:
    """The tenth below all of them; an even one where only every second gets a line."""
    tenths = max(0, math.floor(10 * min(lows) - 1e-9))
    return (tenths if tenths >= 5 else tenths - tenths % 2) / 10


def _ticks(floor: float) -> list[float]:
    """Every tenth from the floor to 1, or every second."""
    tenths = round(10 * (1 - floor))
    step = 1 if tenths <= 5 else 2
    return [1 - 0.1 * k for k in range(0, tenths + 1, step)]


def _text(words: str, x: float, y: float, kind: str, anchor: str = "start") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text{shown} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _tag(name: str, **attributes: object) -> str:
    """One element without content; numbers with one decimal, so that the file stays small."""
    shown = " ".join(
        f'{key.rstrip("_")}="{value:.1f}"'
        if isinstance(value, float)
        else f'{key.rstrip("_")}="{value}"'
        for key, value in attributes.items()
    )
    return f"<{name} {shown}/>"
