"""From a component's calls to its recording: shapes, floors and swaps measured on the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from diffoundry.capture.asked import Asked
from diffoundry.capture.floors import measure_floors, worst_floors
from diffoundry.capture.reference import Reference
from diffoundry.capture.shapes import own_shape, record_shapes, resized
from diffoundry.capture.swaps import Ranges, record_swaps
from diffoundry.formats.recording import Call, ComponentRecording, spread

FLOOR_CALLS = 3
"""Calls on which floors are measured: float64 and emulated fp16 are slow."""

PROBED_CANDIDATES = 2
"""Values tried of an input where a large model's calls are counted."""

Say = Callable[[str], None]


def record(
    reference: Reference,
    kept: Sequence[Call],
    pool: Sequence[Call],
    asked: Asked,
    ranges: Ranges,
    say: Say,
) -> ComponentRecording:
    """The recording of one component: at most `asked.max_calls` of `kept`, and of the evaluation
    split its shapes, floors and swaps, whose values come from `pool`.

    Raises ModelError where the original makes NaN or infinity.
    """
    calls = spread(kept, asked.max_calls)
    shapes = record_shapes(
        reference, calls, asked.shapes, asked.untraced_shapes, one_by_one=bool(asked.probe)
    )
    made = ComponentRecording(
        contract=reference.contract,
        calls=tuple(calls),
        swaps=(),
        shape_calls=shapes,
        floors={},
        left_out=tuple(dict(own_shape(reference.contract, shape)) for shape in asked.left_out),
    )
    if asked.split != "evaluation":
        return made
    measure = _probe_one if asked.probe else _probe_all
    return measure(reference, made, pool, asked, ranges, say)


def _probe_all(
    reference: Reference,
    recorded: ComponentRecording,
    pool: Sequence[Call],
    asked: Asked,
    ranges: Ranges,
    say: Say,
) -> ComponentRecording:
    """Floors on a sample of the calls and at every shape, swaps on the first call."""
    name = reference.contract.component
    say(f"{name}: floors")
    sampled = spread(recorded.calls, FLOOR_CALLS)
    measured = measure_floors(reference, [*sampled, *recorded.shape_calls], say, asked.precisions)
    floors = worst_floors(measured[: len(sampled)])
    shapes = tuple(
        dataclasses.replace(call, floors=own)
        for call, own in zip(recorded.shape_calls, measured[len(sampled) :], strict=True)
    )
    say(f"{name}: swaps")
    swaps = record_swaps(reference, recorded.bases, pool, floors, ranges)
    return dataclasses.replace(recorded, shape_calls=shapes, floors=floors, swaps=swaps)


def _probe_one(
    reference: Reference,
    recorded: ComponentRecording,
    pool: Sequence[Call],
    asked: Asked,
    ranges: Ranges,
    say: Say,
) -> ComponentRecording:
    """Floors and swaps on the one call at the probe's shape, few values tried."""
    name, contract = reference.contract.component, reference.contract
    shape = dict(own_shape(contract, asked.probe))
    bases = recorded.bases
    base = next(index for index, call in enumerate(bases) if call.shape == shape)
    say(f"{name}: floors")
    floors = worst_floors(measure_floors(reference, [bases[base]], say, asked.precisions))
    say(f"{name}: swaps")
    others = [resized(contract, call, shape) for call in pool]
    swaps = record_swaps(reference, bases, others, floors, ranges, base, PROBED_CANDIDATES)
    return dataclasses.replace(recorded, floors=floors, swaps=swaps)
