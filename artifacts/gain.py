"""What a compressed engine gains over its baseline on one host: a part of evidence/<host>.json."""

from __future__ import annotations

from diffoundry.artifacts.manifest import Record

PAYS = 1.05
"""From this ratio of medians on something may count as faster; from 1 / PAYS down as slower."""
NOISY = 2.0
"""From this ratio of the ninetieth to the tenth percentile on, other work disturbed the run."""
INTEGER_SHARE = 0.95
"""Of the layers planned for integer kernels: fewer are stated aloud."""


class Gain(Record):
    """What one engine, or a whole picture, gains over its baseline on this host.

    `speed` is the baseline's median seconds over this one's: above 1 is faster; `p10` and `p90`
    are percentiles of the same ratio round by round. `pays`: faster beyond doubt. Memory is the
    peak of a fresh process, where it was measured. Of the `planned_layers` that a quantization
    plan wants in integer kernels, the runtime really ran `integer_layers` so.
    """

    pays: bool
    speed: float
    p10: float | None = None
    p90: float | None = None
    rounds: int
    seconds: float
    baseline_seconds: float
    size_bytes: int | None = None
    baseline_size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    baseline_peak_memory_bytes: int | None = None
    integer_layers: int | None = None
    planned_layers: int | None = None

    @property
    def word(self) -> str:
        """ "pays 1.80 ×", "DOES NOT PAY 0.80 ×", or UNCLEAR where only the median is faster."""
        unclear = "UNCLEAR" if self.speed >= PAYS else "DOES NOT PAY"
        return f"{'pays' if self.pays else unclear} {self.speed:.2f} ×"

    @property
    def noisy(self) -> bool:
        return self.p10 is not None and self.p90 is not None and self.p90 >= NOISY * self.p10

    @property
    def takes(self) -> str:
        """Seconds or milliseconds of a call: before → after."""
        if self.baseline_seconds >= 1:
            return f"{self.baseline_seconds:.2f} → {self.seconds:.2f} s"
        return f"{1e3 * self.baseline_seconds:.3g} → {1e3 * self.seconds:.3g} ms"

    @property
    def figures(self) -> str:
        """Spread, time and megabytes, before → after, and what ran in integers."""
        parts = [] if self.p10 is None else [f"{self.p10:.2f}–{self.p90:.2f}"]
        parts.append(self.takes)
        if self.baseline_size_bytes and self.size_bytes:
            before, after = (_megabytes(one) for one in (self.baseline_size_bytes, self.size_bytes))
            parts.append(f"{before} → {after} MB")
        return ", ".join([*parts, *filter(None, (self.kernels,))])

    @property
    def kernels(self) -> str:
        """How many planned layers ran in integer kernels; "" where none was planned or nobody
        knows."""
        if not self.planned_layers or self.integer_layers is None:
            return ""
        few = self.integer_layers < INTEGER_SHARE * self.planned_layers
        counts = f"{self.integer_layers} of {self.planned_layers}"
        return f"{'ONLY ' if few else ''}{counts} planned layers in integer kernels"


class VariantGain(Record):
    """Whether a compressed variant pays on this host, as the build measured it.

    `against` names the baseline. `components` has the engines that differ from it, `unchanged`
    names those that are the same; `picture` is a whole picture, added up from its calls. Figures
    hold for these `engines` (component -> digest of the engine and of its baseline), `tools`
    (distribution -> version) and `threads`. `deferred` or `problem` say why there are none.
    """

    against: str = ""
    components: dict[str, Gain] = {}
    unchanged: tuple[str, ...] = ()
    picture: Gain | None = None
    engines: dict[str, tuple[str, str]] = {}
    tools: dict[str, str] = {}
    threads: int = 0
    deferred: str = ""
    problem: str = ""

    def lines(self, name: str) -> list[str]:
        """The verdict of the variant `name`: who it is held against, then one line for each
        component and one for the picture."""
        if self.deferred or self.problem:
            why = f"deferred: {self.deferred}" if self.deferred else f"NOT MEASURED: {self.problem}"
            return [f"does it pay? {name}: {why}"]
        lines = [f"does it pay? {name} against {self.against}, on this host:"]
        lines += [
            f"  {name} · {component}: {gain.word} ({gain.figures})"
            for component, gain in sorted(self.components.items())
        ]
        lines += [f"  {name} · {component}: the same engine" for component in self.unchanged]
        if self.picture is not None:
            lines.append(f"  {name} · a picture: {self.picture.word} ({self.picture.figures})")
        noisy = [one for one, gain in sorted(self.components.items()) if gain.noisy]
        if noisy:
            lines.append(
                f"  noisy ({', '.join(noisy)}): other work runs on this machine; "
                "bench the bundle when it is idle"
            )
        return lines


def _megabytes(size_bytes: int) -> str:
    size = size_bytes / 1e6
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"
