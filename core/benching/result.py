"""What a bench found, as data; `as_document` is what `--json` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffoundry.artifacts.compression import Compressed
from diffoundry.artifacts.evidence import this_host
from diffoundry.artifacts.gain import NOISY, Gain
from diffoundry.benching.alone import Alone
from diffoundry.benching.contenders import Absent, Entry
from diffoundry.benching.request import PictureTask, Request
from diffoundry.benching.timing import Spread


@dataclass(frozen=True)
class Verdict:
    """Whether a variant is worth having, against whom, and in words. `gain` has the figures of a
    picture, `components` those of each call; both are empty where `pays` is None."""

    pays: bool | None
    against: str | None
    text: str
    gain: Gain | None = None
    components: Mapping[str, Gain] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        gain = None if self.gain is None else self.gain.model_dump(mode="json")
        return {"pays": self.pays, "against": self.against, "text": self.text, "gain": gain}


@dataclass
class Row:
    """Everything measured of one contender.

    `ratio` is PyTorch eager's median over this one's (above 1: faster), None without PyTorch;
    `component_ratios` the same a component. `rounds` has the seconds of each round that `picture`
    (under "") and `components` sum up. `throughput` is batch -> pictures a second.
    `integer_layers` is component -> how many planned layers the runtime ran in integer kernels.
    """

    entry: Entry
    size_bytes: Mapping[str, int] = field(default_factory=dict)
    alone: Alone = field(default_factory=Alone)
    picture: Spread | None = None
    ratio: float | None = None
    components: dict[str, Spread] = field(default_factory=dict)
    component_ratios: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, Sequence[float]] = field(default_factory=dict)
    compression: Mapping[str, Compressed] = field(default_factory=dict)
    integer_layers: dict[str, int] = field(default_factory=dict)
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
            "components": {name: self._component(name) for name in self.components},
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
            document["verdict"] = self.verdict.as_json()
        if self.quality is not None:
            document["prompt_accuracy"] = self.quality["prompt_accuracy"]
            document["quality"] = self.quality
        if self.metrics is not None:
            document["metrics"] = self.metrics
        return document

    def _component(self, name: str) -> dict[str, Any]:
        """One component; of a variant also what it gains, and how it was made smaller."""
        document: dict[str, Any] = {
            "seconds": _plain(self.components[name]),
            "against_pytorch_eager": self.component_ratios.get(name),
        }
        if self.verdict is not None and name in self.verdict.components:
            document["gain"] = self.verdict.components[name].model_dump(mode="json")
        if name in self.compression:
            document["compression"] = self.compression[name].as_json()
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
