"""How often colour, shape, size and background come out right, where a recogniser can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import Scene, caption, parse
from diffoundry.reporting.pictures import Pair, Pictures
from diffoundry.types import Array

REFERENCE = "reference"
TOGETHER = "all together"


@dataclass(frozen=True)
class Reading:
    """What the recogniser reads in one picture; `scene` is None where it abstains."""

    wanted: Scene
    scene: Scene | None

    @property
    def right(self) -> bool:
        return self.scene == self.wanted

    @property
    def words(self) -> str:
        return caption(self.scene) if self.scene is not None else "unreadable"


@dataclass(frozen=True)
class Score:
    """`hits` of `count` pictures; an abstention is no hit."""

    hits: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.hits / self.count if self.count else 0.0


def read(prompt: str, image: Array | None) -> Reading | None:
    """Read one picture; None where the prompt or the size is not the embedded model's."""
    try:
        wanted = parse(prompt)
        return Reading(wanted, None if image is None else recognise(image))
    except ValueError:
        return None


def readings(pair: Pair) -> dict[str, Reading]:
    """Readings of the reference and of every engine; empty where there is no recogniser."""
    images = {REFERENCE: pair.reference, **{one.variant: one.image for one in pair.engines}}
    found = {who: read(pair.recorded.prompt, image) for who, image in images.items()}
    return {who: one for who, one in found.items() if one is not None}


def score_attributes(pictures: Pictures) -> dict[str, dict[str, Score]]:
    """attribute -> who -> score over all pairs; empty where no picture can be read."""
    by_who: dict[str, list[Reading]] = {}
    for pair in pictures.pairs:
        for who, one in readings(pair).items():
            by_who.setdefault(who, []).append(one)
    if not by_who:
        return {}
    names = [field.name for field in dataclasses.fields(Scene)]
    scores = {
        name: {who: _score(_has(one, name) for one in all_) for who, all_ in by_who.items()}
        for name in names
    }
    scores[TOGETHER] = {who: _score(r.right for r in all_) for who, all_ in by_who.items()}
    return scores


def _has(reading: Reading, name: str) -> bool:
    if reading.scene is None:
        return False
    return bool(getattr(reading.scene, name) == getattr(reading.wanted, name))


def _score(hits: Iterable[bool]) -> Score:
    found = list(hits)
    return Score(sum(found), len(found))
