"""What `diffoundry bench --save` measured: seconds, memory and throughput beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffoundry.artifacts.evidence import Evidence
from diffoundry.quality.metrics import TITLES
from diffoundry.reporting.charts import bar, lines
from diffoundry.reporting.costs import megabytes
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Html, el, section, table

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("speed against PyTorch", "against_pytorch_eager", lambda value: f"{value:.2f} ×"),
    ("peak memory", "peak_memory_bytes", megabytes),
    ("energy", "joules_per_picture", lambda value: f"{value:.2f} J"),
    ("prompts right", "prompt_accuracy", lambda value: f"{100 * value:.1f} %"),
)
"""Figures of a record that get a column where any contender has them."""


@dataclass(frozen=True)
class Bench:
    """One contender's record: plain JSON of a file that may be of another version."""

    name: str
    record: Mapping[str, Any]

    def number(self, *path: str) -> float | None:
        """The number at `path` of the record, or None where there is none."""
        value = self.get(*path)
        return float(value) if isinstance(value, int | float) else None

    def get(self, *path: str) -> Any:
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def names(self, key: str) -> list[str]:
        found = self.get(key)
        return [str(one) for one in found] if isinstance(found, Mapping) else []


def benches(evidence: Evidence) -> list[Bench]:
    """Every contender that was measured on this host, PyTorch first."""
    found = dict(getattr(evidence, "baselines", {}))
    for name, variant in evidence.variants.items():
        record = getattr(variant, "bench", None)
        if record:
            found[name] = record
    return [Bench(name, record) for name, record in found.items()]


def speed_section(report: Report) -> Html | None:
    """A table and a chart for each host with a bench; None where there is none."""
    measured = [(one, benches(one)) for one in report.evidence]
    names = [variant.name for variant in report.bundle.manifest.variants]
    parts = [part for one, rows in measured if rows for part in _host(one, rows, names)]
    if not parts:
        return None
    return section("speed", "Speed", parts)


def give_hues(rows: list[Bench], variants: list[str]) -> dict[str, int]:
    """Variants in the colours that they have elsewhere on the page, PyTorch in its own."""
    others = [one.name for one in rows if one.name not in variants]
    order = [*others[:1], *variants, *others[1:]] if others else ["", *variants]
    return {name: hue for hue, name in enumerate(order)}


def _host(evidence: Evidence, rows: list[Bench], variants: list[str]) -> list[Html]:
    host = evidence.host
    first = rows[0]
    settings = [
        f"{first.number(*path):g} {unit}"
        for path, unit in (
            (("settings", "rounds"), "rounds, all contenders in turn"),
            (("settings", "threads"), "threads"),
            (("settings", "steps"), "steps"),
        )
        if first.number(*path) is not None
    ]
    intro = el(
        "p",
        f"On {host.name} ({host.processor}, {host.cores} cores): {', '.join(settings)}. "
        "Seconds are medians, with the tenth to the ninetieth percentile; memory is the peak of a "
        "fresh process.",
    )
    verdicts = [(one.name, one.get("verdict", "text")) for one in rows]
    said = [
        el("li", el("b", name), f": {text}") for name, text in verdicts if isinstance(text, str)
    ]
    hues = give_hues(rows, variants)
    parts: list[Html | None] = [intro, _pictures(rows, hues, host.name)]
    parts.append(el("ul", said, class_="said") if said else None)
    parts += [_components(rows, host.name), _metrics(rows, host.name)]
    parts.append(_throughput(rows, hues, host.name))
    return [part for part in parts if part is not None]


def _pictures(rows: list[Bench], hues: Mapping[str, int], host: str) -> Html:
    slowest = max((one.number("picture_seconds", "median") or 0.0 for one in rows), default=0.0)
    columns = {"one picture": [_spread(one, "picture_seconds") for one in rows]}
    for name, key, words in COLUMNS:
        found = [one.number(key) for one in rows]
        if any(value is not None for value in found):
            columns[name] = ["—" if value is None else words(value) for value in found]
    body = [
        el(
            "tr",
            el("th", one.name, scope="row"),
            el(
                "td",
                bar(one.number("picture_seconds", "median") or 0.0, slowest, hues[one.name]),
                class_="barcell",
            ),
            [el("td", cells[number], class_="number") for cells in columns.values()],
            class_="first",
        )
        for number, one in enumerate(rows)
    ]
    head = ("contender", "", *columns)
    return table(head, body, f"Seconds for a picture on {host}", "bars speed", range(2, len(head)))


def _spread(one: Bench, *path: str) -> Html | str:
    median, low, high = (one.number(*path, key) for key in ("median", "p10", "p90"))
    if median is None:
        return "—"
    spread = f"{_milliseconds(low)} to {_milliseconds(high)}" if low and high else ""
    return el("span", _milliseconds(median), el("br"), el("small", spread))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def _components(rows: list[Bench], host: str) -> Html | None:
    names = list(dict.fromkeys(name for one in rows for name in one.names("components")))
    if not names:
        return None
    body = [
        el(
            "tr",
            el("th", one.name, scope="row"),
            [el("td", _spread(one, "components", n, "seconds"), class_="number") for n in names],
        )
        for one in rows
    ]
    head = ("one call of", *(name.replace("_", " ") for name in names))
    return table(head, body, f"Seconds per component on {host}", "speed", range(1, len(head)))


def _metrics(rows: list[Bench], host: str) -> Html | None:
    """CLIP score, LPIPS and Fréchet distances, where somebody named weights for them."""
    shown = [key for key in TITLES if any(one.number("metrics", key) is not None for one in rows)]
    if not shown:
        return None
    seen = [one for one in rows if one.get("metrics") is not None]
    body = [
        el(
            "tr",
            el("th", one.name, scope="row"),
            [
                el("td", "—" if value is None else format(value, TITLES[key][1]), class_="number")
                for key in shown
                for value in [one.number("metrics", key)]
            ],
        )
        for one in seen
    ]
    settings = [
        f"{number:g} {unit}"
        for key, unit in (("pairs", "pictures"), ("steps", "steps"))
        if (number := seen[0].number("metrics", key)) is not None
    ]
    reference = seen[0].get("metrics", "reference")
    against = f" against {reference}" if isinstance(reference, str) else ""
    caption = f"What pictures are worth on {host}: {', '.join(settings)}{against}"
    return table(("", *(TITLES[key][0] for key in shown)), body, caption, "speed",
                 range(1, len(shown) + 1))  # fmt: skip


def _throughput(rows: list[Bench], hues: Mapping[str, int], host: str) -> Html | None:
    series = {}
    for one in rows:
        found = [
            (float(batch), rate)
            for batch in one.names("throughput")
            if batch.isdecimal()
            and (rate := one.number("throughput", batch, "pictures_per_second")) is not None
        ]
        if found:
            series[one.name] = sorted(found)
    if not series:
        return None
    return lines(series, hues, "batch", f"Pictures a second against the batch, on {host}")
