"""What a bench found, as data; `as_document` is what `--json` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffoundry.artifacts.evidence import this_host
from diffoundry.benching.alone import Alone
from diffoundry.benching.contenders import Absent, Entry
from diffoundry.benching.request import PictureTask, Request
from diffoundry.benching.timing import Spread

PAYS = 1.05
"""From this ratio of medians on a variant may count as faster; from 1 / PAYS down as slower."""


NOISY = 2.0
"""From this ratio of the ninetieth to the tenth percentile on, other work disturbed the run."""


@dataclass(frozen=True)
class Verdict:
    """Whether a variant is worth having, against whom, and in words."""

    pays: bool | None
    against: str | None
    text: str


@dataclass
class Row:
    """Everything measured of one contender.

    `ratio` is PyTorch eager's median over this one's (above 1: faster), None without PyTorch;
    `component_ratios` the same a component. `throughput` is batch -> pictures a second.
    """

    entry: Entry
    size_bytes: Mapping[str, int] = field(default_factory=dict)
    alone: Alone = field(default_factory=Alone)
    picture: Spread | None = None
    ratio: float | None = None
    components: dict[str, Spread] = field(default_factory=dict)
    component_ratios: dict[str, float] = field(default_factory=dict)
    batches: dict[int, Spread] = field(default_factory=dict)
    joules_per_picture: float | None = None
    quality: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    verdict: Verdict | None = None

    @property
    def throughput(self) -> dict[int, float]:
        return {batch: batch / spread.median for batch, spread in self.batches.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes of the files that a picture from text needs."""
        return sum(self.size_bytes.values())

    def as_json(self) -> dict[str, Any]:
        """The row; `prompt_accuracy` stands at its top where it was measured."""
        document: dict[str, Any] = {
            "name": self.entry.name,
            "device": self.entry.device,
            "picture_seconds": _plain(self.picture),
            "against_pytorch_eager": self.ratio,
            "components": {
                name: {
                    "seconds": _plain(spread),
                    "against_pytorch_eager": self.component_ratios.get(name),
                }
                for name, spread in self.components.items()
            },
            "throughput": {
                str(batch): {
                    "pictures_per_second": self.throughput[batch],
                    "seconds": _plain(spread),
                }
                for batch, spread in self.batches.items()
            },
            "size_bytes": dict(self.size_bytes),
            "peak_memory_bytes": self.alone.peak_memory_bytes,
            "first_picture_seconds": self.alone.first_picture_seconds,
            "joules_per_picture": self.joules_per_picture,
        }
        if self.verdict is not None:
            document["verdict"] = dataclasses.asdict(self.verdict)
        if self.quality is not None:
            document["prompt_accuracy"] = self.quality["prompt_accuracy"]
            document["quality"] = self.quality
        if self.metrics is not None:
            document["metrics"] = self.metrics
        return document


@dataclass(frozen=True)
class Result:
    """A whole bench: rows with PyTorch's first, who was absent, and what else has to be said."""

    manifest_digest: str
    request: Request
    task: PictureTask
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]
    energy: str
    notes: tuple[str, ...]

    @property
    def variants(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.entry.kind == "engine")

    @property
    def baselines(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.entry.kind != "engine")

    def as_document(self) -> dict[str, Any]:
        """The `--json` document."""
        return {
            "manifest_digest": self.manifest_digest,
            "host": this_host().model_dump(mode="json"),
            "settings": self.settings(),
            "energy": self.energy,
            "notes": list(self.notes),
            "absent": [dataclasses.asdict(one) for one in self.absent],
            "baselines": [row.as_json() for row in self.baselines],
            "variants": [row.as_json() for row in self.variants],
        }

    def settings(self) -> dict[str, Any]:
        """Under which conditions the figures hold."""
        return {
            **dataclasses.asdict(self.task),
            "rounds": self.request.rounds,
            "threads": self.request.threads,
            "batches": list(self.request.batches),
        }


def _plain(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else dataclasses.asdict(spread)


def fill_ratios(rows: list[Row]) -> None:
    """Put each row in relation to PyTorch eager on the same device, where it took part."""
    eager = {row.entry.device: row for row in rows if row.entry.kind == "eager"}
    for row in rows:
        base = eager.get(row.entry.device)
        if base is None:
            continue
        if base.picture and row.picture:
            row.ratio = base.picture.median / row.picture.median
        for name, spread in row.components.items():
            if name in base.components:
                row.component_ratios[name] = base.components[name].median / spread.median


def noise_notes(rows: Sequence[Row]) -> list[str]:
    """Says where whole pictures took so differently long that ratios are not to be trusted."""
    noisy = [
        f"{row.entry.name} {row.picture.p90 / row.picture.p10:.1f} ×"
        for row in rows
        if row.picture and row.picture.p90 >= NOISY * row.picture.p10
    ]
    if not noisy:
        return []
    words = f"noisy: from the tenth to the ninetieth percentile it is {', '.join(noisy)}"
    return [f"{words}; other work runs on this machine: run it again when it is idle"]


def fill_verdicts(rows: list[Row], precisions: Mapping[str, str]) -> None:
    """Say of each variant whether it pays: against an fp32 engine, or, being one, PyTorch."""
    engines = [row for row in rows if row.entry.kind == "engine"]
    for row in engines:
        peers = [other for other in rows if other.entry.device == row.entry.device]
        base = next((other for other in peers if other.entry.kind == "eager"), None)
        if precisions[row.entry.name] != "fp32":
            full = (e for e in peers if precisions.get(e.entry.name) == "fp32")
            base = next(full, base)
        row.verdict = _verdict(row, base)


def _verdict(row: Row, base: Row | None) -> Verdict:
    if base is None or base.picture is None or row.picture is None:
        return Verdict(None, None, "nothing to hold it against: neither PyTorch nor an fp32 engine")
    name = base.entry.name
    speed = base.picture.median / row.picture.median
    parts = [f"{speed:.2f} × the speed of {name}"]
    if base.total_bytes and row.total_bytes:
        parts.append(f"{row.total_bytes / base.total_bytes:.2f} × its file size")
    memory, other = row.alone.peak_memory_bytes, base.alone.peak_memory_bytes
    if memory and other:
        parts.append(f"{memory / other:.2f} × its memory")
    pays = speed >= PAYS and _wholly_below(row.picture, base.picture)
    if pays:
        word = "pays"
    elif speed <= 1 / PAYS and _wholly_below(base.picture, row.picture):
        word = "does not pay in time (slower)"
    else:
        word = "does not pay in time (no clear difference)"
    return Verdict(pays, name, f"{word}: {', '.join(parts)}")


def _wholly_below(one: Spread, other: Spread) -> bool:
    """Whether the fast rounds and the slow ones are both faster: else noise may have decided."""
    return one.p10 < other.p10 and one.p90 < other.p90
