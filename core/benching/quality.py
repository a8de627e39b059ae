"""How often a contender's pictures show what the prompt says, and whether two differ in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffoundry.artifacts.bundle import Bundle
from diffoundry.benching.contenders import is_embedded
from diffoundry.errors import StageError, UsageError
from diffoundry.generation import TextToImage
from diffoundry.parity.paired import compare_paired, lower_bound, upper_bound
from diffoundry.types import Array

STEPS = 4
"""Denoising steps of every judged picture, whatever the bundle's default is."""
PAIRS = 500
"""Pairs that are judged where no number is asked for."""
NO_RECOGNISER = "what the pictures show is not judged: this model has no recogniser"


@dataclass(frozen=True)
class Judge:
    """`pairs` of prompt and seed; `read` gives what a picture shows (None: unreadable), `wanted`
    what a prompt asks for, in the same form."""

    pairs: Sequence[tuple[str, int]]
    read: Callable[[Array], Any]
    wanted: Callable[[str], Any]


@dataclass(frozen=True)
class Answers:
    """One contender's answers, in the order of the pairs. An abstention counts as wrong."""

    right: tuple[bool, ...]
    abstentions: int

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    def as_json(self) -> dict[str, Any]:
        """`prompt_accuracy` and its exact 95 % interval (Clopper & Pearson 1934)."""
        hits, count = sum(self.right), len(self.right)
        return {
            "prompt_accuracy": self.accuracy,
            "interval_95": [lower_bound(hits, count), upper_bound(hits, count)],
            "pairs": count,
            "abstentions": self.abstentions,
        }


def judge_of(bundle: Bundle, pairs: int | None = None) -> Judge | None:
    """The judge of the bundle's model over the first `pairs` evaluation pairs, or None.

    Raises UsageError where there are not so many.
    """
    if not is_embedded(bundle):
        return None
    from diffoundry.embedded.prompts import load_split
    from diffoundry.embedded.recogniser import recognise
    from diffoundry.embedded.scenes import parse

    split = load_split("evaluation")
    count = min(PAIRS, len(split)) if pairs is None else pairs
    if not 1 <= count <= len(split):
        raise UsageError(
            "--pairs",
            expected=f"1 to {len(split)}, the evaluation pairs there are",
            found=str(count),
            remedy="choose another number",
        )
    return Judge([(pair.prompt, pair.seed) for pair in split[:count]], recognise, parse)


def answer(
    pipeline: TextToImage, judge: Judge, scheduler: str, guidance: float, steps: int
) -> Answers:
    """Make every pair's picture and read it. One that is not finite is unreadable."""
    right = []
    abstentions = 0
    for prompt, seed in judge.pairs:
        try:
            picture = pipeline.generate(
                [prompt], steps=steps, guidance=guidance, scheduler=scheduler, seed=seed
            )[0]
        except StageError:
            found = None
        else:
            found = judge.read(picture.image)
        abstentions += found is None
        right.append(found is not None and found == judge.wanted(prompt))
    return Answers(tuple(right), abstentions)


def compare(reference: str, answers: dict[str, Answers]) -> dict[str, dict[str, Any]]:
    """Each other contender against `reference`, pair by pair."""
    return {
        name: {
            "reference": reference,
            **dataclasses.asdict(compare_paired(answers[reference].right, one.right)),
        }
        for name, one in answers.items()
        if name != reference
    }
