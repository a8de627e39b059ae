"""What a contender's pictures are worth: what they show, and how they differ from PyTorch's.

The first needs the model's recogniser, the second weights that the user names
(`diffoundry.quality`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffoundry.artifacts.bundle import Bundle
from diffoundry.benching.contenders import is_embedded
from diffoundry.benching.request import PictureTask
from diffoundry.errors import StageError, UsageError
from diffoundry.generation import TextToImage
from diffoundry.parity.paired import compare_paired, lower_bound, upper_bound
from diffoundry.profiles.reading import read_prompts
from diffoundry.quality.differences import image_psnr_db
from diffoundry.quality.metrics import MetricFiles
from diffoundry.types import Array

STEPS = 4
"""Denoising steps of every picture that a recogniser reads, whatever the bundle's default is."""
PAIRS = 500
"""Pairs that are judged where no number is asked for."""
SEED_STRIDE = 10_000
"""Between the seeds of a prompt that comes again; the shipped lists' own seeds lie below it."""
SAME_DB = 100.0
"""PSNR of equal pictures: above what one value of 8 bits that is off by one leaves."""
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


@dataclass(frozen=True)
class Exam:
    """Which pictures every contender makes: `pairs` of prompt and seed, steps, size in pixels
    (None: the model's own), and who reads them (None: this model has no recogniser)."""

    pairs: Sequence[tuple[str, int]]
    task: PictureTask
    steps: int
    size: tuple[int, int] | None = None
    judge: Judge | None = None

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.pairs]


def exam_of(
    bundle: Bundle, count: int | None, metrics: MetricFiles, task: PictureTask
) -> Exam | None:
    """The first `count` evaluation pairs of the model, or None where nobody could judge them.

    A model without a recogniser gets the prompts of the shipped list's evaluation split, again
    and again with other seeds, at the bundle's usual steps. Raises UsageError.
    """
    judge = judge_of(bundle, count)
    if judge is not None:
        return Exam(judge.pairs, task, STEPS, judge=judge)
    if not metrics.any:
        return None
    split = read_prompts("default")["evaluation"]
    pairs = []
    for number in range(PAIRS if count is None else count):
        turn, place = divmod(number, len(split))
        prompt, seed = split[place]
        pairs.append((prompt, seed + turn * SEED_STRIDE))
    return Exam(pairs, task, task.steps, (task.height, task.width))


def paint(pipeline: TextToImage, exam: Exam) -> Iterable[Array | None]:
    """Every pair's picture, uint8 [height, width, 3], in order; None where it is not finite."""
    height, width = exam.size or (None, None)
    for prompt, seed in exam.pairs:
        try:
            picture = pipeline.generate(
                [prompt],
                steps=exam.steps,
                guidance=exam.task.guidance,
                scheduler=exam.task.scheduler,
                seed=seed,
                height=height,
                width=width,
            )[0]
        except StageError:
            yield None
        else:
            yield picture.image


def answer(judge: Judge, pictures: Iterable[Array | None]) -> Answers:
    """Read every pair's picture. One that is not finite is unreadable."""
    right = []
    abstentions = 0
    for (prompt, _), picture in zip(judge.pairs, pictures, strict=True):
        found = None if picture is None else judge.read(picture)
        abstentions += found is None
        right.append(found is not None and found == judge.wanted(prompt))
    return Answers(tuple(right), abstentions)


def picture_differences(
    reference: Sequence[Array | None], pictures: Sequence[Array | None]
) -> dict[str, float]:
    """PSNR in dB of each picture against the reference's, uint8: `mean` and `worst`.

    Pictures that are equal count as SAME_DB, and one that is not finite as 0.
    """
    figures = [
        0.0
        if one is None or other is None
        else min(SAME_DB, image_psnr_db(other / np.float32(255), one / np.float32(255)))
        for one, other in zip(pictures, reference, strict=True)
    ]
    return {"mean": float(np.mean(figures)), "worst": min(figures)}


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
