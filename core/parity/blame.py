"""Finds the first node of an engine that goes wrong, by probing intermediate values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffoundry.errors import DiffoundryError
from diffoundry.parity.engine import Engine
from diffoundry.parity.subject import Subject
from diffoundry.types import Array


@dataclass(frozen=True)
class Blame:
    """The words for a check's message, and the same as values for JSON."""

    words: str
    values: Mapping[str, Any]


Feeds = Mapping[str, Array]


def find_bad_node(subject: Subject, kind: str, sick: Feeds, healthy: Feeds | None) -> Blame:
    """Name the first node, in execution order, that shows the sickness `kind` on `sick` feeds.

    Nodes that show it in a healthy call too (an attention mask of -inf), or in the fp32 engine
    of the same export, are innocent. Where the format can't be probed, the words say so.
    """
    shows = _SHOWS[kind]
    try:
        nodes = _showing(subject.engine, sick, shows)
        innocent = set(_showing(subject.engine, healthy, shows)) if healthy is not None else set()
    except DiffoundryError as error:
        return Blame(f"no node can be named: {error.where}", {"probe": error.where})
    except Exception as error:  # noqa: BLE001 - a probe that breaks must not hide the sickness
        words = f"{type(error).__name__}: {error}"
        return Blame(f"no node can be named, the probe broke: {words}", {"probe": words})
    innocent |= _innocent_in_fp32(subject, sick, shows)
    suspects = [name for name in nodes if name not in innocent]
    if not suspects:
        words = "the probed nodes do not show it: it arises at the outputs"
        return Blame(words, {"probe": words})
    return _proposal(subject, suspects[0])


def _proposal(subject: Subject, node: str) -> Blame:
    if subject.precision == "fp32":
        words = f"first bad node: {node} (already fp32: its conversion is wrong)"
        return Blame(words, {"first_bad_node": node})
    words = f"first bad node: {node}; keep it in fp32"
    return Blame(words, {"first_bad_node": node, "keep_fp32": [node]})


def _showing(engine: Engine, feeds: Feeds, shows: Callable[[Array], bool]) -> list[str]:
    return [name for name, value in engine.probe(feeds).items() if shows(np.asarray(value))]


def _innocent_in_fp32(subject: Subject, sick: Feeds, shows: Callable[[Array], bool]) -> set[str]:
    if subject.fp32_engine is None:
        return set()
    try:
        return set(_showing(subject.fp32_engine, sick, shows))
    except Exception:  # noqa: BLE001 - only a help: without it more nodes stay under suspicion
        return set()


def _is_float(value: Array) -> bool:
    return value.dtype.kind == "f" and value.size > 0


def _not_finite(value: Array) -> bool:
    return _is_float(value) and not np.isfinite(value).all()


def _constant(value: Array) -> bool:
    return _is_float(value) and value.size > 1 and bool(value.max() == value.min())


def _saturated(value: Array) -> bool:
    """Many of a node's values stand at one extreme that is not zero (a ReLU rests at zero)."""
    if not _is_float(value) or value.size < 16:
        return False
    extremes = [limit for limit in (value.max(), value.min()) if limit != 0]
    return any(float((value == limit).mean()) > 0.05 for limit in extremes)


_SHOWS: Mapping[str, Callable[[Array], bool]] = {
    "not_finite": _not_finite,
    "constant": _constant,
    "saturated": _saturated,
}
