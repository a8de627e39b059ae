"""Charts as inline SVG. Words and figures beside bars stay text: they wrap, scale, and are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diffoundry.reporting.markup import Html, el

HUES = 6
"""How many colours style.css has for series; 0 is PyTorch wherever it takes part."""


def bar(value: float, largest: float, series: int = 0) -> Html:
    """A horizontal bar as wide as its cell; `largest` fills it."""
    share = 100 * value / largest if largest > 0 and math.isfinite(value) else 0.0
    width = f"{max(0.0, min(100.0, share)):.1f}%"
    return el(
        "svg",
        el("rect", class_="track", width="100%", height=10, rx=2),
        el("rect", class_=f"series-{series % HUES}", width=width, height=10, rx=2),
        class_="bar",
        width="100%",
        height=10,
        aria_hidden="true",
        focusable="false",
    )


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    hues: Mapping[str, int],
    x_name: str,
    y_name: str,
) -> Html:
    """A line chart from zero; each series is (x, y) points in rising x, x shown at even steps.

    Narrow on purpose: a phone shows its words at a size that can be read.
    """
    xs = sorted({x for points in series.values() for x, _ in points})
    top = _round_up(max((y for points in series.values() for _, y in points), default=1.0))
    left, right, high, low = 40, 405, 14, 190

    def place(x: float, y: float) -> tuple[float, float]:
        step = (right - left) / max(1, len(xs) - 1)
        return left + xs.index(x) * step, low - (low - high) * y / top

    parts = []
    for tick in range(5):
        y = place(xs[0], top * tick / 4)[1] if xs else low
        label = f"{top * tick / 4:g}"
        parts.append(el("rect", class_="grid", x=left, y=f"{y:.1f}", width=right - left, height=1))
        parts.append(el("text", label, x=left - 8, y=f"{y + 4:.1f}", text_anchor="end"))
    for x in xs:
        at = f"{place(x, 0)[0]:.1f}"
        parts.append(el("text", f"{x:g}", x=at, y=low + 20, text_anchor="middle"))
    for name, points in series.items():
        colour = f"series-{hues[name] % HUES}"
        spots = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(el("polyline", points=path, class_=f"line {colour}"))
        parts += [
            el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5, class_=colour) for x, y in spots
        ]
    parts.append(el("text", x_name, x=right, y=low + 40, text_anchor="end", class_="axis"))
    drawing = el("svg", *parts, viewBox="0 0 420 236", role="img", aria_label=y_name)
    caption = el("figcaption", y_name, ": ", legend({name: hues[name] for name in series}))
    return el("figure", caption, drawing, class_="chart")


def legend(hues: Mapping[str, int]) -> Html:
    """What each colour stands for."""
    return el("span", [_key(hue, name) for name, hue in hues.items()], class_="legend")


def _key(hue: int, name: str) -> Html:
    square = el("rect", width=10, height=10, rx=2, class_=f"series-{hue % HUES}")
    return el("span", el("svg", square, width=10, height=10, aria_hidden="true"), " ", name)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8, 10 × a power of ten."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value), value)
