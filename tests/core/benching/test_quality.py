"""What pictures are worth: abstentions are wrong, comparisons in pairs, nothing left unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.benching import quality
from diffoundry.benching.contenders import Entry
from diffoundry.benching.quality import Answers, Exam, Judge, answer, compare, exam_of, paint
from diffoundry.benching.request import PictureTask
from diffoundry.benching.result import Row
from diffoundry.benching.seeing import Sights, measured, said_of
from diffoundry.errors import StageError, UsageError
from diffoundry.generation import Picture
from diffoundry.profiles.reading import read_prompts
from diffoundry.quality.lpips import ALEXNET
from diffoundry.quality.metrics import NEEDED, MetricFiles, open_metrics
from tests.core.quality.weights import add_noise, make_lpips, make_pictures

TASK = PictureTask("a cat", 7, 3.0, "lcm", 48, 32)
NO_WEIGHTS = MetricFiles()


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
    exam = Exam(judge.pairs, TASK, 4, judge=judge)
    found = answer(judge, paint(painter, exam))  # type: ignore[arg-type]
    assert found.right == (True, True, False, False, False)
    assert found.abstentions == 2
    assert found.accuracy == 0.4
    assert painter.asked[2] == {
        "prompts": ["3"], "steps": 4, "guidance": 3.0, "scheduler": "lcm", "seed": 4,
        "height": None, "width": None,
    }  # fmt: skip


def test_an_unreadable_picture_is_wrong_even_where_nothing_is_wanted() -> None:
    judge = Judge([("", 200)], read, lambda prompt: None)
    pictures = paint(Painter(), Exam(judge.pairs, TASK, 4))  # type: ignore[arg-type]
    assert answer(judge, pictures).right == (False,)


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


def test_the_embedded_model_is_asked_its_own_pairs_at_four_steps() -> None:
    exam = exam_of(Named("shapes-lcm"), 5, NO_WEIGHTS, TASK)  # type: ignore[arg-type]
    assert exam is not None and exam.judge is not None and len(exam.pairs) == 5
    assert exam.steps == 4 and exam.size is None


def test_another_model_is_asked_only_where_somebody_can_judge() -> None:
    other: Any = Named("my-lcm")
    assert exam_of(other, 5, NO_WEIGHTS, TASK) is None
    exam = exam_of(other, 40, MetricFiles(fid=Path("inception.safetensors")), TASK)
    assert exam is not None and exam.judge is None
    assert exam.steps == TASK.steps and exam.size == (48, 32)
    splits = read_prompts("default")
    assert list(exam.pairs[: len(splits["evaluation"])]) == splits["evaluation"]
    assert len(set(exam.pairs)) == 40, "a prompt that comes again has another seed"
    others = {pair for name in ("calibration", "tuning") for pair in splits[name]}
    assert not others & set(exam.pairs)
    assert not {seed for _, seed in others} & {seed for _, seed in exam.pairs}


def test_every_contender_is_held_against_the_first(tmp_path: Path) -> None:
    metrics = open_metrics(MetricFiles(lpips=make_lpips(tmp_path / "a.safetensors", ALEXNET)))
    exam = Exam([("a", 1), ("b", 2)], TASK, 7)
    sights = Sights(metrics, exam)
    pictures = make_pictures(2, 0)
    first = sights.look("PyTorch eager", pictures)
    equal = sights.look("exact", pictures)
    noisy = sights.look("noisy", add_noise(pictures, 20))
    assert first["lpips"] is None and measured(first) == []
    assert equal["lpips"] == 0 < noisy["lpips"] <= noisy["lpips_max"]
    assert noisy["reference"] == "PyTorch eager" and noisy["pairs"] == 2
    assert noisy["clip_score"] is None and "--clip DIR" in noisy["not_measured"]["clip_score"]
    assert noisy["weights"]["lpips"]["name"] == "a.safetensors"


def test_what_is_not_measured_is_said_with_the_option_that_measures_it() -> None:
    said = said_of([], None, open_metrics(NO_WEIGHTS))
    assert quality.NO_RECOGNISER in said
    for metric, option in (("clip_score", "--clip"), ("lpips", "--lpips"), ("fid", "--fid")):
        assert any(metric in line and option in line for line in said)


def test_a_contender_with_sick_pictures_is_said_by_name(tmp_path: Path) -> None:
    metrics = open_metrics(MetricFiles(lpips=make_lpips(tmp_path / "a.safetensors", ALEXNET)))
    exam = Exam([("a", 1), ("b", 2)], TASK, 7)
    row = Row(Entry("broken", "engine", "cpu"))
    row.metrics = Sights(metrics, exam).look("broken", [*make_pictures(1, 0), None])
    assert [row.metrics[name] for name in NEEDED] == [None] * 4
    said = said_of([row], exam, metrics)
    assert "not measured: lpips of broken: 1 of 2 pictures are not finite" in said


def test_pictures_are_compared_with_the_first_contenders_too() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    off = np.full((8, 8, 3), 151, np.uint8)  # 0.2 of the range: 14 dB
    found = quality.picture_differences([grey, grey], [grey, off])
    assert found["worst"] == pytest.approx(13.98, abs=0.01)
    assert found["mean"] == pytest.approx((13.98 + quality.SAME_DB) / 2, abs=0.01)
    assert quality.picture_differences([grey], [None]) == {"mean": 0.0, "worst": 0.0}
