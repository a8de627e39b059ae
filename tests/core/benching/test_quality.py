"""Prompt accuracy: abstentions are wrong, intervals hold the figure, comparisons are in pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffoundry.benching import quality
from diffoundry.benching.quality import Answers, Judge, answer, compare
from diffoundry.errors import StageError, UsageError
from diffoundry.generation import Picture


class Painter:
    """A pipeline whose picture is its seed; seed 13 comes out as NaN."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def generate(self, prompts: list[str], **options: Any) -> list[Picture]:
        self.asked.append({"prompts": prompts, **options})
        if options["seed"] == 13:
            raise StageError("generated picture", found="NaN")
        return [Picture(np.full((1, 1, 3), options["seed"], np.uint8), options["seed"])]


def read(image: np.ndarray) -> int | None:
    """The seed that was painted, unreadable above 100."""
    value = int(image[0, 0, 0])
    return None if value > 100 else value


def test_wrong_unreadable_and_sick_pictures_all_count_as_wrong() -> None:
    judge = Judge([("1", 1), ("2", 2), ("3", 4), ("200", 200), ("13", 13)], read, int)
    painter = Painter()
    found = answer(painter, judge, "lcm", 3.0, 4)  # type: ignore[arg-type]
    assert found.right == (True, True, False, False, False)
    assert found.abstentions == 2
    assert found.accuracy == 0.4
    assert painter.asked[2] == {
        "prompts": ["3"], "steps": 4, "guidance": 3.0, "scheduler": "lcm", "seed": 4,
    }  # fmt: skip


def test_an_unreadable_picture_is_wrong_even_where_nothing_is_wanted() -> None:
    judge = Judge([("", 200)], read, lambda prompt: None)
    assert answer(Painter(), judge, "lcm", 3.0, 4).right == (False,)  # type: ignore[arg-type]


def test_the_interval_holds_the_accuracy() -> None:
    document = Answers((True,) * 97 + (False,) * 3, 1).as_json()
    low, high = document["interval_95"]
    assert document["prompt_accuracy"] == 0.97
    assert low == pytest.approx(0.9148, abs=1e-4) and high == pytest.approx(0.9938, abs=1e-4)
    assert document["abstentions"] == 1 and document["pairs"] == 100


def test_contenders_are_compared_pair_by_pair_with_the_reference() -> None:
    answers = {
        "PyTorch eager": Answers((True, True, False, True), 0),
        "engine": Answers((True, False, True, True), 0),
    }
    found = compare("PyTorch eager", answers)
    assert list(found) == ["engine"]
    assert found["engine"]["reference"] == "PyTorch eager"
    assert (found["engine"]["only_reference"], found["engine"]["only_engine"]) == (1, 1)


class Named:
    """As much of a bundle as is asked for its model's name."""

    def __init__(self, name: str) -> None:
        self.manifest = self
        self.model = self
        self.name = name


def test_only_the_embedded_model_has_a_recogniser() -> None:
    assert quality.judge_of(Named("my-lcm"), 5) is None  # type: ignore[arg-type]
    judge = quality.judge_of(Named("shapes-lcm"), 5)  # type: ignore[arg-type]
    assert judge is not None and len(judge.pairs) == 5
    prompt, _ = judge.pairs[0]
    assert judge.wanted(prompt) is not None


def test_more_pairs_than_there_are_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--pairs"):
        quality.judge_of(Named("shapes-lcm"), 100_000)  # type: ignore[arg-type]
