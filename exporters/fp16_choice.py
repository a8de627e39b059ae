"""Decides by measurement which nodes of a float16 graph stay float32, and says why.

Reasons, in the order in which they are looked for:
operator     the operator's definition has no float16
range        a value that the node reads or computes exceeds half of float16's largest number
phase        the node leads to a sine or cosine whose argument float16 would round too coarsely
sensitivity  keeping it float32 makes an output measurably better, and the target was missed
follows      it only moves values between nodes that stay float32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.exporters import fp16_graph
from diffoundry.exporters.fp16_trials import Trials

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_FP16 = 65504.0
_SAFETY = 2.0
# float16 has 11 significant bits: an argument of 2 is off by 2^-11, of 999 by a quarter.
_PHASE_ERROR_PER_UNIT, _PHASE_ERROR_ALLOWED = 2.0**-12, 2.0**-9
_PERIODIC = ("Sin", "Cos")
_MOVES = ("Reshape", "Transpose", "Slice", "Concat", "Split", "Unsqueeze", "Squeeze", "Expand",
          "Gather", "Flatten", "Identity", "Pad")  # fmt: skip
# A part that a split does not concentrate is taken whole; a gain below this is none.
_CONCENTRATES, _SMALLEST_GAIN_DB = 0.75, 0.1


@dataclass(frozen=True)
class Kept:
    """One node that stays float32, and the figure that decided."""

    node: str
    op_type: str
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What stays float32, and what was measured (emulated: each operation's output rounded)."""

    stays_fp32: Mapping[str, Kept]
    float_nodes: int
    target_sqnr_db: float
    sqnr_db: Mapping[str, float]
    sqnr_db_all_fp16: Mapping[str, float]
    trials: int

    def document(self) -> dict[str, Any]:
        """precision.json."""
        return {
            "schema": "diffoundry.precision/1.0",
            "precision": "fp16",
            "target_sqnr_db": self.target_sqnr_db,
            "target_reached": min(self.sqnr_db.values()) >= self.target_sqnr_db,
            "sqnr_db": dict(self.sqnr_db),
            "sqnr_db_all_fp16": dict(self.sqnr_db_all_fp16),
            "measured_by": "emulation: computed in float32, inputs and outputs of every float16 "
            "node rounded to float16; worst recorded call",
            "trials": self.trials,
            "nodes": self.float_nodes,
            "fp32_share": round(len(self.stays_fp32) / max(self.float_nodes, 1), 4),
            "stays_fp32": list(self.stays_fp32.values()),
        }


def choose(
    model: ir.Model,
    calls: Sequence[Mapping[str, Any]],
    scratch: Path,
    threads: int,
    target_sqnr_db: float,
    max_fp32_share: float,
    max_trials: int,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Measure `model` (float32; it is used up) on `calls` and decide.

    Deterministic for the same model, calls and machine. Raises StageError for a graph that
    cannot be rewritten.
    """
    graph = _Wiring(model)
    outputs = [value.name or "" for value in model.graph.outputs]
    trials = Trials(model, calls, scratch, threads)
    kept = {name: Kept(name, op, "operator") for name, op in graph.only_fp32.items()}
    kept |= _out_of_range(graph, trials)
    search = _Search(graph, trials, kept, target_sqnr_db, max_fp32_share, max_trials)
    plain = trials.noise(set(trials.candidates))
    search.run(say)
    names = {**search.kept, **graph.followers(search.kept)}
    return Choice(
        {name: names[name] for name in graph.order if name in names},
        len(graph.order),
        target_sqnr_db,
        dict(zip(outputs, map(_sqnr_db, search.noise.max(axis=0)), strict=True)),
        dict(zip(outputs, map(_sqnr_db, plain.max(axis=0)), strict=True)),
        search.trials_used,
    )


class _Wiring:
    """Which float nodes there are, and which values they read, as plain names."""

    def __init__(self, model: ir.Model) -> None:
        nodes = [node for node in model.graph if fp16_graph.touches_float(node)]
        self.order = [node.name or "" for node in nodes]
        self.op_type = {node.name or "": node.op_type for node in nodes}
        self.only_fp32 = {
            node.name or "": node.op_type for node in nodes if not fp16_graph.can_be_fp16(node)
        }
        self.reads = {
            node.name or "": [value.name or "" for _, value in fp16_graph.float_inputs(node)]
            for node in nodes
        }
        self.writes = {node.name or "": [v.name or "" for v in node.outputs] for node in nodes}
        self.producer = {value: name for name, made in self.writes.items() for value in made}

    def before(self, node: str) -> list[str]:
        """The nodes whose values `node` reads."""
        return [self.producer[value] for value in self.reads[node] if value in self.producer]

    def ancestors(self, node: str) -> set[str]:
        found: set[str] = set()
        waiting = [node]
        while waiting:
            fresh = [name for name in self.before(waiting.pop()) if name not in found]
            found.update(fresh)
            waiting += fresh
        return found

    def followers(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Nodes that only move values, all of which come from float32 nodes."""
        found: dict[str, Kept] = {}
        for name in self.order:
            sources = self.before(name)
            if name in kept or self.op_type[name] not in _MOVES or not sources:
                continue
            if all(source in kept or source in found for source in sources):
                found[name] = Kept(name, self.op_type[name], "follows")
        return found


def _out_of_range(graph: _Wiring, trials: Trials) -> dict[str, Kept]:
    """Nodes whose values float16 cannot hold, and those that lead to a coarse phase."""
    peaks = {**trials.weight_peaks, **trials.peaks()}
    found = {}
    for name in graph.order:
        values = graph.reads[name] + graph.writes[name]
        peak = max((peaks[value] for value in values if value in peaks), default=0.0)
        if peak > LARGEST_FP16 / _SAFETY:
            found[name] = _kept(graph, name, "range", peak=peak)
    for name in graph.order:
        if graph.op_type[name] in _PERIODIC:
            peak = max((peaks.get(value, 0.0) for value in graph.reads[name]), default=0.0)
            error = peak * _PHASE_ERROR_PER_UNIT
            if error > _PHASE_ERROR_ALLOWED:
                for one in {name} | graph.ancestors(name):
                    found.setdefault(
                        one, _kept(graph, one, "phase", argument_peak=peak, phase_error=error)
                    )
    return found


class _Search:
    """Returns nodes to float32, the largest gain first, until the target is met.

    Starts with all nodes of one operator as a part, and halves the part with the largest gain
    while one half holds most of it.
    """

    def __init__(
        self,
        graph: _Wiring,
        trials: Trials,
        kept: dict[str, Kept],
        target_sqnr_db: float,
        max_fp32_share: float,
        max_trials: int,
    ) -> None:
        self._graph, self._trials = graph, trials
        self.kept = kept
        self._target = 10.0 ** (-target_sqnr_db / 10)
        self._most = int(max_fp32_share * len(graph.order))
        self._left = max_trials
        self.trials_used = 0
        self.noise = self._measure(())

    def run(self, say: Callable[[str], None]) -> None:
        parts = self._parts()
        gains: dict[tuple[str, ...], float] = {}
        while self._worst() > self._target and self._left > 0:
            gains = {part: self._gain(part) for part in parts if self._fits(part)}
            best = self._concentrate(gains)
            if best is None or _gain_db(self._worst(), gains[best]) < _SMALLEST_GAIN_DB:
                return
            before = _sqnr_db(self._worst())
            best, whole = self._shrink(best), best
            self._keep(best, before)
            say(f"fp16: {len(best)} nodes back to fp32, {before} -> {_sqnr_db(self._worst())} dB")
            parts = [part for part in gains if part != whole]
            # Only parts that were worth something are looked at again.
            parts.sort(key=lambda part: -gains[part])
            parts = parts[:8]

    def _parts(self) -> list[tuple[str, ...]]:
        by_operator: dict[str, list[str]] = {}
        for name in self._graph.order:
            if name not in self.kept and self._graph.op_type[name] not in _MOVES:
                by_operator.setdefault(self._graph.op_type[name], []).append(name)
        # No part may be larger than what is still allowed.
        size = max(self._most - len(self.kept), 1)
        return [
            tuple(names[start : start + size])
            for names in by_operator.values()
            for start in range(0, len(names), size)
        ]

    def _concentrate(self, gains: dict[tuple[str, ...], float]) -> tuple[str, ...] | None:
        """Halve the best part while a half holds most of its gain; adds the halves to `gains`."""
        while gains:
            best = max(gains, key=lambda part: (gains[part], -len(part), part))
            if len(best) == 1 or self._left < 2:
                return best
            halves = [best[: len(best) // 2], best[len(best) // 2 :]]
            found = {half: self._gain(half) for half in halves}
            if max(found.values()) < _CONCENTRATES * gains[best]:
                return best
            del gains[best]
            gains.update(found)
        return None

    def _shrink(self, part: tuple[str, ...]) -> tuple[str, ...]:
        """A half of the part, and a half of that, as long as it is enough for the target."""
        while len(part) > 1 and self._left > 1:
            halves = (part[: len(part) // 2], part[len(part) // 2 :])
            enough = [half for half in halves if float(self._measure(half).max()) <= self._target]
            if not enough:
                return part
            part = enough[0]
        return part

    def _gain(self, part: tuple[str, ...]) -> float:
        """How much noise goes when `part` is float32 too."""
        if self._left <= 0:
            return 0.0
        after = float(self._measure(part).max())
        return self._worst() - after if math.isfinite(after) else 0.0

    def _fits(self, part: tuple[str, ...]) -> bool:
        return len(self.kept) + len(part) <= self._most

    def _keep(self, part: tuple[str, ...], before_db: float) -> None:
        noise = self._measure(part)
        after_db = _sqnr_db(float(noise.max()))
        for name in part:
            self.kept[name] = _kept(
                self._graph, name, "sensitivity", sqnr_db_without=before_db, sqnr_db_with=after_db
            )
        self.noise = noise

    def _measure(self, part: Sequence[str]) -> Any:
        self._left -= 1
        self.trials_used += 1
        kept = {**self.kept, **{name: self.kept.get(name) for name in part}}
        stays = set(kept) | set(self._graph.followers(kept))  # type: ignore[arg-type]
        return self._trials.noise(set(self._trials.candidates) - stays)

    def _worst(self) -> float:
        return float(self.noise.max())


def _kept(graph: _Wiring, name: str, reason: str, **figures: float) -> Kept:
    rounded = {key: float(f"{min(value, 3.4e38):.4g}") for key, value in figures.items()}
    return Kept(name, graph.op_type[name], reason, rounded)


def _gain_db(noise: float, gain: float) -> float:
    if not math.isfinite(gain):
        return math.inf
    return 10 * math.log10(noise / max(noise - gain, 1e-30)) if gain > 0 else 0.0


def _sqnr_db(noise_to_signal: float) -> float:
    """Signal-to-noise ratio in dB with one decimal, within ±300."""
    if not math.isfinite(noise_to_signal):
        return -300.0
    return round(min(-10 * math.log10(max(noise_to_signal, 1e-30)), 300.0), 1)
