"""Does it pay? Each variant against the one that it would replace, with the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import evidence_path, read_evidence
from diffoundry.artifacts.gain import PAYS, Gain, VariantGain
from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.benching.gains import gain_of
from diffoundry.benching.result import Row, Verdict
from diffoundry.benching.timing import Spread, wholly_below
from diffoundry.errors import DiffoundryError

PICTURE = ""
"""Where a row keeps the rounds of whole pictures."""
NOTHING = "nothing to hold it against: neither PyTorch nor an fp32 engine of its runtime"


@dataclass(frozen=True)
class Traits:
    """What decides whom a variant is held against."""

    runtime: str
    compressed: bool
    shapes: str = "dynamic"


def traits_of(variants: Sequence[VariantRecord]) -> dict[str, Traits]:
    """Variant -> its traits."""
    return {v.name: Traits(v.runtime, v.compressed, v.shape_policy.kind) for v in variants}


def fill_verdicts(rows: Sequence[Row], traits: Mapping[str, Traits]) -> None:
    """Say of each variant whether it pays.

    A compressed one (fp16, INT8, pruned) is held against an uncompressed fp32 engine of the same
    runtime and device, where there is one; any other, and one without such a peer, against
    PyTorch eager in fp32.
    """
    for row in rows:
        if row.entry.kind == "engine":
            row.verdict = _verdict(row, _baseline(row, rows, traits))


def said_by_the_build(bundle: Bundle, rows: Sequence[Row]) -> list[str]:
    """What the build measured here of compressed variants that have no fp32 peer in the bundle:
    against PyTorch alone, an engine that is slower than its fp32 form would go unnoticed."""
    lines = []
    for row in rows:
        gain = _built_gain(bundle, row.entry.name)
        against = row.verdict.against if row.verdict is not None else None
        if gain is None or gain.picture is None or against in _names(bundle):
            continue
        parts = ", ".join(f"{name} {one.word}" for name, one in sorted(gain.components.items()))
        lines.append(
            f"{row.entry.name}, when it was built, against {gain.against}: a picture "
            f"{gain.picture.word} ({gain.picture.figures}); {parts}"
        )
    return lines


def _built_gain(bundle: Bundle, name: str) -> VariantGain | None:
    try:
        path = evidence_path(bundle.path)
        evidence = read_evidence(path) if path.is_file() else None
    except DiffoundryError:
        return None
    if evidence is None or evidence.manifest_digest != bundle.digest:
        return None
    found = evidence.variants.get(name)
    return found.gain if found is not None else None


def _names(bundle: Bundle) -> set[str]:
    return {variant.name for variant in bundle.manifest.variants}


def _baseline(row: Row, rows: Sequence[Row], traits: Mapping[str, Traits]) -> Row | None:
    own = traits[row.entry.name]
    here = [other for other in rows if other.entry.device == row.entry.device]
    if own.compressed:
        full = [
            other
            for other in here
            if (its := traits.get(other.entry.name)) is not None
            and its.runtime == own.runtime
            and not its.compressed
        ]
        full.sort(key=lambda other: traits[other.entry.name].shapes != own.shapes)
        if full:
            return full[0]
    return next((other for other in here if other.entry.kind == "eager"), None)


def _verdict(row: Row, base: Row | None) -> Verdict:
    if base is None or base.picture is None or row.picture is None:
        return Verdict(None, None, NOTHING)
    name = base.entry.name
    gain = _gain(row, base, PICTURE, row.picture, base.picture).model_copy(
        update={
            "size_bytes": row.total_bytes or None,
            "baseline_size_bytes": base.total_bytes or None,
            "peak_memory_bytes": row.alone.peak_memory_bytes,
            "baseline_peak_memory_bytes": base.alone.peak_memory_bytes,
        }
    )
    components = {
        one: _gain(row, base, one, spread, base.components[one]).model_copy(
            update={
                "size_bytes": row.size_bytes.get(one),
                "baseline_size_bytes": base.size_bytes.get(one),
                "integer_layers": row.integer_layers.get(one),
                "planned_layers": len(row.compression[one].integer_modules)
                if one in row.compression
                else None,
            }
        )
        for one, spread in row.components.items()
        if one in base.components
    }
    if gain.pays:
        word = "pays"
    elif gain.speed <= 1 / PAYS and wholly_below(base.picture, row.picture):
        word = "does not pay in time (slower)"
    else:
        word = "does not pay in time (no clear difference)"
    return Verdict(gain.pays, name, f"{word}: {_figures(gain, name)}", gain, components)


def _gain(row: Row, base: Row, what: str, own: Spread, other: Spread) -> Gain:
    """By the rounds where both kept them, else by the spreads alone."""
    if what in row.rounds and len(row.rounds[what]) == len(base.rounds.get(what, ())):
        return gain_of(base.rounds[what], row.rounds[what])
    speed = other.median / own.median
    return Gain(
        pays=speed >= PAYS and wholly_below(own, other),
        speed=speed,
        rounds=own.rounds,
        seconds=own.median,
        baseline_seconds=other.median,
    )


def _figures(gain: Gain, name: str) -> str:
    spread = "" if gain.p10 is None else f" ({gain.p10:.2f}–{gain.p90:.2f} round by round)"
    parts = [f"{gain.speed:.2f} × the speed of {name}{spread}"]
    if gain.size_bytes and gain.baseline_size_bytes:
        parts.append(f"{gain.size_bytes / gain.baseline_size_bytes:.2f} × its file size")
    if gain.peak_memory_bytes and gain.baseline_peak_memory_bytes:
        ratio = gain.peak_memory_bytes / gain.baseline_peak_memory_bytes
        parts.append(f"{ratio:.2f} × its memory")
    return ", ".join(parts)
