"""Metrics of what contenders paint, over weights that the user names, one contender at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffoundry.benching.quality import NO_RECOGNISER, Exam
from diffoundry.benching.result import Row
from diffoundry.quality.metrics import NEEDED, Metrics, Seen, small_sample_note
from diffoundry.types import Array


class Sights:
    """Holds every contender against the first that was looked at.

    Only the first one's pictures are kept, and those for LPIPS alone.
    """

    def __init__(self, metrics: Metrics, exam: Exam) -> None:
        self.metrics = metrics
        self.exam = exam
        self.weights = metrics.files.identities()
        self.reference: tuple[str, Seen] | None = None

    def look(self, name: str, pictures: Sequence[Array | None]) -> dict[str, Any]:
        """One contender's figures, a JSON object; those that are None have a reason beside them."""
        seen = self.metrics.see(pictures, self.exam.prompts)
        figures = self.metrics.figures(seen, self.reference[1] if self.reference else None)
        self.reference = self.reference or (name, seen)
        return {
            **dataclasses.asdict(figures),
            "pairs": len(self.exam.pairs),
            "steps": self.exam.steps,
            "reference": self.reference[0],
            "weights": self.weights,
        }


def measured(found: Mapping[str, Any]) -> list[str]:
    """The metrics of a row that have a figure."""
    return [name for name in NEEDED if found[name] is not None]


def said_of(rows: Sequence[Row], exam: Exam | None, metrics: Metrics) -> list[str]:
    """What was not measured and how to have it, and what a Fréchet distance is not good for."""
    said = [] if exam is not None and exam.judge is not None else [NO_RECOGNISER]
    groups: dict[str, list[str]] = {}
    for name, why in metrics.files.unnamed().items():
        groups.setdefault(why, []).append(name)
    said += [f"not measured: {', '.join(names)}: {why}" for why, names in groups.items()]
    sick = {
        f"not measured: {', '.join(names)} of {row.entry.name}: {row.metrics['problem']}"
        for row in rows
        if row.metrics and row.metrics["problem"]
        and (names := [n for n in NEEDED if n not in metrics.files.unnamed()])
    }  # fmt: skip
    said += sorted(sick)
    if exam is not None and any(
        row.metrics and {"fid", "fid_clip"} & set(measured(row.metrics)) for row in rows
    ):
        said += [note for note in [small_sample_note(len(exam.pairs))] if note]
    return said
