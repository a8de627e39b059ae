"""All metrics together: what is named is measured, everything else has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffoundry.errors import ModelError
from diffoundry.quality.lpips import ALEXNET
from diffoundry.quality.metrics import (
    IS_REFERENCE,
    NEEDED,
    MetricFiles,
    Metrics,
    open_metrics,
    small_sample_note,
)
from tests.core.quality.weights import add_noise, make_clip, make_lpips, make_pictures

PROMPTS = ["a red circle", "a blue square", "a ring", "a star"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> MetricFiles:
    folder = tmp_path_factory.mktemp("weights")
    return MetricFiles(
        clip=make_clip(folder / "clip"), lpips=make_lpips(folder / "a.safetensors", ALEXNET)
    )


@pytest.fixture(scope="module")
def metrics(files: MetricFiles) -> Metrics:
    return open_metrics(files)


def test_without_weights_every_metric_says_how_to_have_it() -> None:
    metrics = open_metrics(MetricFiles())
    seen = metrics.see(make_pictures(2, 0), PROMPTS[:2])
    found = metrics.figures(seen, seen)
    assert found.clip_score is None and found.lpips is None and found.fid is None
    assert set(found.not_measured) == set(NEEDED)
    for metric, option in (("clip_score", "--clip"), ("lpips", "--lpips"), ("fid", "--fid"),
                           ("fid_clip", "--clip")):  # fmt: skip
        assert option in found.not_measured[metric]


def test_equal_pictures_are_equal_in_every_figure(metrics: Metrics) -> None:
    seen = metrics.see(make_pictures(4, 1), PROMPTS)
    found = metrics.figures(seen, seen)
    assert found.clip_score is not None and 0 <= found.clip_score <= 100
    assert (found.clip_score_change, found.lpips, found.lpips_max) == (0, 0, 0)
    assert found.fid_clip == pytest.approx(0, abs=1e-9) and found.fid is None
    assert set(found.not_measured) == {"fid"}


def test_noise_raises_every_distance(metrics: Metrics) -> None:
    pictures = make_pictures(4, 2)
    reference = metrics.see(pictures, PROMPTS)
    found = [
        metrics.figures(metrics.see(add_noise(pictures, sigma), PROMPTS), reference)
        for sigma in (0, 10, 60)
    ]
    for key in ("lpips", "lpips_max", "fid_clip"):
        values = [getattr(one, key) for one in found]
        assert values == sorted(values) and values[1] > values[0] and values[2] > values[1]
    assert found[2].lpips_max >= found[2].lpips > 0  # type: ignore[operator]
    assert found[2].clip_score_change_error > 0  # type: ignore[operator]


def test_the_reference_has_a_score_but_no_distance_to_itself(metrics: Metrics) -> None:
    found = metrics.figures(metrics.see(make_pictures(4, 3), PROMPTS), None)
    assert found.clip_score is not None and found.clip_score_change is None
    assert found.not_measured["lpips"] == found.not_measured["fid_clip"] == IS_REFERENCE
    assert "--fid" in found.not_measured["fid"]


def test_pictures_that_are_not_finite_leave_no_figure(metrics: Metrics) -> None:
    sick = metrics.see([*make_pictures(3, 4), None], PROMPTS)
    found = metrics.figures(sick, metrics.see(make_pictures(4, 4), PROMPTS))
    assert found.clip_score is None and found.lpips is None
    assert found.problem == "1 of 4 pictures are not finite" == found.not_measured["lpips"]
    well = metrics.figures(metrics.see(make_pictures(4, 4), PROMPTS), sick)
    assert well.clip_score is not None and well.lpips is None
    assert well.not_measured["fid_clip"].startswith("the reference: 1 of 4")


def test_one_picture_has_no_frechet_distance(metrics: Metrics) -> None:
    seen = metrics.see(make_pictures(1, 5), PROMPTS[:1])
    found = metrics.figures(seen, seen)
    assert found.fid_clip is None and "--pairs" in found.not_measured["fid_clip"]
    assert found.lpips == 0


def test_figures_name_the_weights_they_hold_for(files: MetricFiles, tmp_path: Path) -> None:
    found = files.identities()
    assert set(found) == {"clip", "lpips"} and found["lpips"]["name"] == "a.safetensors"
    other = MetricFiles(lpips=make_lpips(tmp_path / "a.safetensors", ALEXNET, seed=1))
    assert other.identities()["lpips"]["digest"] != found["lpips"]["digest"]


def test_wrong_files_fail_before_anything_is_opened(files: MetricFiles, tmp_path: Path) -> None:
    (tmp_path / "inception.pth").write_bytes(b"")
    with pytest.raises(ModelError, match="InceptionV3 weights"):
        open_metrics(MetricFiles(clip=files.clip, fid=tmp_path / "inception.pth"))


def test_few_pictures_are_not_passed_off_as_a_published_fid() -> None:
    assert "500 pictures" in small_sample_note(500) and small_sample_note(50_000) == ""
