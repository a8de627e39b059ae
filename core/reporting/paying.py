"""What compression bought: verdict, latency, size, parameters, before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from diffoundry.artifacts.compression import Change, Compressed, read_compression
from diffoundry.artifacts.evidence import Evidence
from diffoundry.artifacts.gain import Gain
from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.reporting.costs import megabytes
from diffoundry.reporting.gathering import Report
from diffoundry.reporting.markup import Child, Html, code, el, section, table
from diffoundry.reporting.speed import Bench, benches

PICTURE = "a picture"
NONE = "—"
HEAD = ("variant", "component", "on this host", "takes", "files", "parameters",
        "multiply-adds", "layers in the plan")  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What one host measured of a variant. `said` is why there is nothing; `unchanged` names the
    components that are the same engine as the baseline's."""

    against: str
    gains: Mapping[str, Gain]
    said: str = ""
    unchanged: tuple[str, ...] = ()


def paying_section(report: Report) -> Html | None:
    """A table a host of every compressed variant; None where nothing was compressed."""
    manifest = report.bundle.manifest
    variants = [variant for variant in manifest.variants if variant.compressed]
    if not variants:
        return None
    names = [variant.name for variant in manifest.variants]
    records = {v.name: read_compression(report.bundle, v) for v in variants}
    parts = [
        _host(
            one.host.name,
            variants,
            records,
            {v.name: measured(one, v.name, names) for v in variants},
        )
        for one in report.evidence
    ]
    if not parts:
        parts = [_host("no host", variants, records, {})]
    intro = el(
        "p",
        "Each engine that was made smaller on purpose, beside the same engine in fp32: interleaved "
        "medians, before → after; below each verdict the spread round by round. It pays where it "
        "is faster beyond doubt. From ",
        code("diffoundry bench --save"),
        " where that had an fp32 variant beside it, else from the build’s own short timing.",
    )
    return section("paying", "Does it pay?", intro, parts)


def measured(evidence: Evidence, name: str, variants: Collection[str]) -> Measured:
    """A bench's figures against another of the `variants`, else the build's, else a bench's
    against PyTorch, which says nothing of what compression bought."""
    bench = next((one for one in benches(evidence) if one.name == name), None)
    variant = evidence.variants.get(name)
    gain = variant.gain if variant is not None else None
    if bench is not None and bench.get("verdict", "gain") is not None:
        same_runtime = bench.get("verdict", "against") in variants
        if same_runtime or gain is None or gain.picture is None:
            return _of_bench(bench)
    if gain is None:
        return Measured("", {}, "not measured here")
    if gain.deferred or gain.problem:
        return Measured("", {}, f"deferred: {gain.deferred}" if gain.deferred else gain.problem)
    picture = {PICTURE: gain.picture} if gain.picture is not None else {}
    gains = {**gain.components, **picture}
    return Measured(gain.against, gains, unchanged=gain.unchanged)


def _of_bench(bench: Bench) -> Measured:
    found = {
        name: _gain(bench.get("components", name, "gain")) for name in bench.names("components")
    }
    found[PICTURE] = _gain(bench.get("verdict", "gain"))
    against = bench.get("verdict", "against")
    return Measured(
        against if isinstance(against, str) else "",
        {name: gain for name, gain in found.items() if gain is not None},
    )


def _gain(data: object) -> Gain | None:
    """A gain of a file that may be of another version."""
    try:
        return Gain.model_validate(data)
    except ValidationError:
        return None


def _host(
    host: str,
    variants: list[VariantRecord],
    records: Mapping[str, Mapping[str, Compressed]],
    found: Mapping[str, Measured],
) -> Html:
    body = []
    for variant in variants:
        one = found.get(variant.name, Measured("", {}, "not measured"))
        against = f"against {one.against}" if one.against else one.said
        names = [*variant.engines, *([PICTURE] if PICTURE in one.gains else [])]
        for number, name in enumerate(names):
            size = variant.engines[name].size_bytes if name in variant.engines else None
            made = records[variant.name].get(name, Compressed())
            whose = None
            if not number:
                label = [code(variant.name), el("br"), el("small", against)]
                whose = el("th", label, scope="rowgroup", rowspan=len(names))
            without = "the same engine" if name in one.unchanged else NONE
            cells = _cells(name, one.gains.get(name), made, size, without)
            body.append(el("tr", whose, cells, class_="first" if whose else None))
    return table(HEAD, body, f"What compression bought on {host}", "paying", range(3, 7))


def _cells(
    name: str, gain: Gain | None, made: Compressed, size: int | None, without: str
) -> list[Html]:
    schemes = ", ".join(f"{count} {scheme}" for scheme, count in made.layers.items())
    sizes = NONE if size is None else megabytes(size)
    kernels = gain.kernels if gain is not None else ""
    takes: Child = NONE
    if gain is not None:
        takes = gain.takes
        if gain.size_bytes and gain.baseline_size_bytes:
            sizes = f"{megabytes(gain.baseline_size_bytes)} → {megabytes(gain.size_bytes)}"
    counts = (takes, sizes, _count(made.parameters), _count(made.multiply_adds))
    return [
        el("th", name.replace("_", " "), scope="row"),
        el("td", without if gain is None else _verdict(gain)),
        *(el("td", one, class_="number") for one in counts),
        el("td", schemes or NONE, [el("br"), el("small", kernels)] if kernels else None),
    ]


def _verdict(gain: Gain) -> Html:
    spread = None if gain.p10 is None else f"{gain.p10:.2f} to {gain.p90:.2f}"
    kind = "passed" if gain.pays else "failed"
    return el(
        "span",
        el("span", gain.word, class_=f"status {kind}"),
        [el("br"), el("small", spread)] if spread else None,
    )


def _count(change: Change | None) -> str:
    if change is None:
        return NONE
    before, after = change
    share = f" (−{100 * (1 - after / before):.0f} %)" if before else ""
    return f"{before / 1e6:.3g} → {after / 1e6:.3g} M{share}"
