"""Nothing dropped: each input of a component exchanged for another value, and what that does.

For each input, the other recorded values are tried and the one with the largest effect is kept.
Where its effect is less than FLOOR_MULTIPLE times the floor of fp32 or of fp16, wider but legal
values are tried too (`wide_values`), and the best of them is kept besides, or instead where the
recorded one decides nothing even at fp32. If no value decides at fp32, float64 is asked: no
change there means that the input has no influence in this model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffoundry.capture.reference import Reference
from diffoundry.capture.trajectories import embed_guidance
from diffoundry.errors import ModelError
from diffoundry.formats.recording import Call, Effect, Floor, Swap, spread
from diffoundry.types import Array, TensorSpec

CANDIDATES = 4
# A change below this share of the output's own size is float64's rounding.
NO_CHANGE = 1e-12

Floors = Mapping[str, Mapping[str, Floor]]


@dataclass(frozen=True)
class Ranges:
    """What is legal beyond the recorded values.

    `vocabulary` counts token ids, `train_timesteps` the steps that the model was trained on; 0
    where a component takes none.
    """

    vocabulary: int = 0
    train_timesteps: int = 0


@dataclass(frozen=True)
class _Base:
    """The call that is changed, and its place in the recording (`Swap.base`)."""

    index: int
    call: Call


@dataclass(frozen=True)
class _Candidate:
    label: str
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    effects: Mapping[str, Effect]
    score: float


def record_swaps(
    reference: Reference,
    calls: Sequence[Call],
    pool: Sequence[Call],
    floors: Floors,
    ranges: Ranges,
    base: int = 0,
    candidates: int = CANDIDATES,
) -> tuple[Swap, ...]:
    """The swaps of every input, based on calls[base]; `pool` holds all the recorded calls.

    At most `candidates` recorded values, and as many wider ones, are tried of an input.
    """
    based = _Base(base, calls[base])
    swaps: list[Swap] = []
    for spec in reference.contract.inputs:
        values = _recorded_values(spec.name, based.call, pool, candidates)
        real = _best(reference, based.call, spec.name, values, floors)
        wide = None
        if real is None or not _decides_everything(based, real, floors):
            values = wide_values(spec, based.call.feeds[spec.name], ranges)
            values = spread(values, candidates)
            wide = _best(reference, based.call, spec.name, values, floors)
        swaps += _choose(reference, based, spec.name, real, wide, floors)
    return tuple(swaps)


def wide_values(spec: TensorSpec, value: Array, ranges: Ranges) -> list[tuple[str, Array]]:
    """Legal values for an input that reach beyond the recorded ones, with what they are."""
    batch = value.shape[0]
    if spec.name == "attention_mask":
        return [("every token", np.ones_like(value)), ("half the tokens", _half_mask(value))]
    if value.dtype.kind == "i":
        draw = np.random.Generator(np.random.PCG64(0))
        ids = draw.integers(0, ranges.vocabulary, (CANDIDATES, *value.shape), dtype=value.dtype)
        return [(f"random token ids {number}", one) for number, one in enumerate(ids)]
    if spec.name == "timestep":
        last = ranges.train_timesteps - 1
        steps = sorted({0, last // 4, last // 2, last})
        return [(f"timestep {step}", np.full_like(value, step)) for step in steps]
    if spec.name == "timestep_cond":
        return [
            (f"guidance {guidance:g}", embed_guidance(guidance, value.shape[1], batch))
            for guidance in (1.0, 2.0, 5.0, 14.0)
        ]
    mirrored = np.ascontiguousarray(value[..., ::-1])
    values = [("negated", -value), ("mirrored", mirrored)]
    # A picture has a range; latents and embeddings have none.
    return values if spec.name == "image" else [*values, ("tripled", value * np.float32(3))]


def _half_mask(value: Array) -> Array:
    mask = np.ones_like(value)
    mask[:, value.shape[1] // 2 :] = 0
    return mask


def _recorded_values(
    name: str, base: Call, pool: Sequence[Call], count: int
) -> list[tuple[str, Array]]:
    """Up to `count` different recorded values, evenly spread, that are not the base's."""
    here = base.feeds[name]
    distinct: dict[bytes, tuple[str, Array]] = {}
    for call in pool:
        value = call.feeds[name]
        if value.shape == here.shape and not np.array_equal(value, here):
            distinct.setdefault(value.tobytes(), (f"recorded: {call.prompt}", value))
    return spread(list(distinct.values()), count)


def _best(
    reference: Reference,
    base: Call,
    name: str,
    values: Sequence[tuple[str, Array]],
    floors: Floors,
) -> _Candidate | None:
    """The value whose effect, over the floor, is the largest in the output it moves least."""
    found = []
    for label, value in values:
        feeds = {**base.feeds, name: value}
        try:
            outputs = reference.infer(feeds)
        except ModelError:
            continue  # a combination that no trajectory met may overflow: try another
        effects = measure_effects(outputs, base.outputs)
        score = min(_over_floor(effects[key], floors["fp32"][key]) for key in effects)
        found.append(_Candidate(label, feeds, outputs, effects, score))
    return max(found, key=lambda candidate: candidate.score, default=None)


def measure_effects(outputs: Mapping[str, Array], base: Mapping[str, Array]) -> dict[str, Effect]:
    """The change of each output, in float64."""
    effects = {}
    for name, array in outputs.items():
        change = array.astype(np.float64) - base[name].astype(np.float64)
        effects[name] = Effect(float(np.abs(change).max()), float(np.sqrt(np.mean(change**2))))
    return effects


def _over_floor(effect: Effect, floor: Floor) -> float:
    return effect.rms / max(floor.rms, float(np.finfo(np.float32).tiny))


def _as_swap(
    base: _Base,
    candidate: _Candidate,
    name: str,
    status: Literal["real", "enlarged", "no_influence"],
) -> Swap:
    return Swap(
        input=name,
        base=base.index,
        feeds=candidate.feeds,
        outputs=candidate.outputs,
        status=status,
        effect=max(effect.max_abs for effect in candidate.effects.values()),
        effects=candidate.effects,
        value=candidate.label,
    )


def _decides_everything(base: _Base, candidate: _Candidate, floors: Floors) -> bool:
    swap = _as_swap(base, candidate, "", "real")
    return all(len(swap.decides(of_one)) == len(swap.effects) for of_one in floors.values())


def _choose(
    reference: Reference,
    base: _Base,
    name: str,
    real: _Candidate | None,
    wide: _Candidate | None,
    floors: Floors,
) -> list[Swap]:
    """What is kept of the best recorded and the best wider value."""
    kept = []
    if real and _as_swap(base, real, name, "real").decides(floors["fp32"]):
        kept.append(_as_swap(base, real, name, "real"))
    if wide and (not kept or real is None or wide.score > real.score):
        enlarged = _as_swap(base, wide, name, "enlarged")
        if kept or enlarged.decides(floors["fp32"]):
            kept.append(enlarged)
        else:
            kept.append(_ask_double(reference, base, name, wide))
    return kept


def _ask_double(reference: Reference, base: _Base, name: str, wide: _Candidate) -> Swap:
    """A change too small for fp32: "no_influence", or its size as float64 sees it.

    In the second case the swap stays "enlarged" with an effect that decides nothing: the input
    moves the output by less than rounding does.
    """
    exact_base = reference.infer_double(base.call.feeds)
    exact = reference.infer_double(wide.feeds)
    effects = measure_effects(exact, exact_base)
    moved = [
        effect.max_abs > NO_CHANGE * float(np.abs(exact_base[key]).max())
        for key, effect in effects.items()
    ]
    if any(moved):
        seen = _Candidate(wide.label, wide.feeds, wide.outputs, effects, wide.score)
        return _as_swap(base, seen, name, "enlarged")
    none = {key: Effect(0.0, 0.0) for key in effects}
    unmoved = _Candidate(wide.label, wide.feeds, base.call.outputs, none, 0.0)
    return _as_swap(base, unmoved, name, "no_influence")
