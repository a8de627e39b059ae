"""Trajectories and pictures: right engines pass, each kind of wrong one is shown to fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.embedded.scenes import draw, parse
from diffoundry.errors import DeferredError, MissingToolError
from diffoundry.formats.recording import PipelineRecording
from diffoundry.parity.checks.image import check_prompt_accuracy
from diffoundry.parity.pipeline import check_pipeline
from diffoundry.parity.playing import Played
from diffoundry.parity.table import rows
from diffoundry.types import CheckResult, Limits, ParityResult
from tests.core.parity import pipeline_fakes as fakes


@pytest.fixture
def recording() -> PipelineRecording:
    return fakes.make_recording()


def judge(recording, sessions=None, **limits) -> ParityResult:
    opened = fakes.make_sessions() if sessions is None else sessions
    return check_pipeline(
        lambda: opened,
        fakes.FakeTokenizer(),
        fakes.FakeTables(),
        fakes.GEOMETRY,
        recording,
        **limits,
    )


def by_name(result: ParityResult) -> dict[str, CheckResult]:
    return {check.name: check for check in result.checks}


def test_right_engines_pass_and_are_closed(recording):
    sessions = fakes.make_sessions()
    result = judge(recording, sessions)
    assert result.passed, result.checks
    lines = by_name(result)
    assert lines["final_latents"].values["trajectories"] == 2
    assert lines["pictures"].values["worst_ssim"] == pytest.approx(1.0)
    assert all(session.closed for session in sessions.values())


def test_a_unet_off_by_a_hundredth_fails_trajectory_and_pictures(recording):
    result = judge(recording, fakes.make_sessions(unet=lambda v: v * 1.01))
    lines = by_name(result)
    assert lines["final_latents"].status == "failed"
    assert "max_abs" in lines["final_latents"].message
    assert lines["pictures"].status == "failed"


def test_a_bad_decoder_fails_the_pictures_alone(recording):
    lines = by_name(judge(recording, fakes.make_sessions(vae_decoder=lambda v: v + 0.02)))
    assert lines["final_latents"].status == "passed"
    assert lines["pictures"].status == "failed"
    assert lines["pictures"].values["worst_psnr_db"] == pytest.approx(40, abs=1)


@pytest.mark.parametrize("value", [np.nan, 0.0], ids=["nan", "blank"])
def test_sick_pictures_fail_with_finite_figures(recording, value):
    sessions = fakes.make_sessions(vae_decoder=lambda v: np.full_like(v, value))
    line = by_name(judge(recording, sessions))["pictures"]
    assert line.status == "failed"
    assert np.isfinite([line.values["mean_psnr_db"], line.values["worst_ssim"]]).all()


def test_an_ssim_limit_is_held(recording):
    noise = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    sessions = fakes.make_sessions(vae_decoder=lambda v: v + 0.05 * noise)
    line = by_name(judge(recording, sessions, image_limits=Limits(ssim=0.999)))["pictures"]
    assert line.status == "failed" and "ssim" in line.message
    assert line.values["failed_pictures"] == [0, 1]


def test_one_bad_trajectory_among_good_ones_fails(recording):
    first = recording.trajectories[0]
    spoiled = dataclasses.replace(first, final_latents=first.final_latents + 0.01)
    mixed = dataclasses.replace(recording, trajectories=(*recording.trajectories, spoiled))
    line = by_name(judge(mixed))["final_latents"]
    assert line.status == "failed"
    assert line.values["failed_trajectories"] == [2]
    assert line.values["worst_trajectory"] == 2


def test_an_engine_that_raises_fails_with_its_message(recording):
    def broken(value):
        raise RuntimeError("kernel 7 crashed")

    lines = by_name(judge(recording, fakes.make_sessions(unet=broken)))
    assert "kernel 7 crashed" in lines["final_latents"].message
    assert "kernel 7 crashed" in lines["pictures"].message
    assert {line.status for line in lines.values()} == {"failed", "info"}


def test_a_decoder_of_another_size_fails(recording):
    lines = by_name(judge(recording, fakes.make_sessions(vae_decoder=lambda v: v[:, :, ::2])))
    assert "has the shape" in lines["pictures"].message


def test_a_missing_engine_fails(recording):
    sessions = fakes.make_sessions()
    del sessions["unet"]
    result = judge(recording, sessions)
    assert result.failed and "KeyError" in result.checks[0].message


def test_an_empty_recording_is_not_a_pass(recording):
    result = judge(dataclasses.replace(recording, trajectories=()))
    assert result.failed
    assert by_name(result)["pictures"].status == "failed"


def test_no_limits_prove_nothing(recording):
    result = judge(recording, trajectory_limits=Limits(), image_limits=Limits())
    assert [c.status for c in result.checks][:2] == ["failed", "failed"]


@pytest.mark.parametrize("error", [DeferredError("needs CUDA"), RuntimeError("corrupt")])
def test_engines_that_do_not_open(recording, error):
    def fail():
        raise error

    result = check_pipeline(
        fail, fakes.FakeTokenizer(), fakes.FakeTables(), fakes.GEOMETRY, recording
    )
    wanted = "deferred" if isinstance(error, DeferredError) else "failed"
    assert [c.status for c in result.checks] == [wanted]
    assert not result.passed


def test_a_missing_tool_is_raised(recording):
    def fail():
        raise MissingToolError("onnxruntime")

    with pytest.raises(MissingToolError):
        check_pipeline(fail, fakes.FakeTokenizer(), fakes.FakeTables(), fakes.GEOMETRY, recording)


# -- previews --------------------------------------------------------------------------------


def with_preview(spoil=lambda value: value):
    """Right engines, and a preview decoder that sees the latents undivided."""
    preview = fakes.FakeComponent(
        lambda feeds: fakes.FUNCTIONS["vae_decoder"](
            {"latent": feeds["latent"] / fakes.GEOMETRY.latent_scaling_factor}
        ),
        spoil,
    )
    return {**fakes.make_sessions(), "preview_decoder": preview}


def test_a_preview_decoder_adds_a_line_that_decides_nothing(recording):
    plain = judge(recording)
    sessions = with_preview(lambda value: value + 0.2)
    result = judge(recording, sessions)
    *others, line = result.checks
    assert others == list(plain.checks) and result.passed
    assert (line.level, line.name, line.status) == ("image", "preview", "info")
    # 0.2 of -1..1 is 0.1 of 0..1, and less where a pixel is at its end.
    assert 20 <= line.values["worst_psnr_db"] <= line.values["mean_psnr_db"] < 23
    assert line.values["pictures"] == 2 and sessions["preview_decoder"].closed
    assert "PSNR worst" in rows([result])[-1][2]


def test_a_right_preview_decoder_is_as_good_as_the_full_one(recording):
    assert judge(recording, with_preview()).checks[-1].values["worst_psnr_db"] > 100


def test_previews_are_decoded_from_the_golden_latents_not_from_the_engines(recording):
    sessions = {**with_preview(), **fakes.make_sessions(unet=lambda v: v * 1.5)}
    assert judge(recording, sessions).checks[-1].values["worst_psnr_db"] > 100


def test_a_preview_decoder_that_raises_is_said_and_fails_nothing(recording):
    def broken(value):
        raise RuntimeError("kernel 7 crashed")

    result = judge(recording, with_preview(broken))
    assert result.passed and "kernel 7 crashed" in result.checks[-1].message


# -- what the pictures show -----------------------------------------------------------------


def drawn(prompt: str) -> np.ndarray:
    return draw(parse(prompt), np.random.default_rng(0))[None].astype(np.float32) / 255


def played(recording: PipelineRecording, shown: list[str], made: list[str]) -> list[Played]:
    """Trajectories whose reference pictures show `shown` and whose engine pictures `made`."""
    return [
        Played(dataclasses.replace(one, image=drawn(left)), one.final_latents, drawn(right))
        for one, left, right in zip(recording.trajectories, shown, made, strict=True)
    ]


WRONG = "a large red ring on a black background"


def test_accuracies_are_compared_in_pairs(recording):
    a, b = fakes.CAPTIONS
    (line,) = check_prompt_accuracy(played(recording, [a, b], [a, WRONG]), Limits())
    assert line.status == "info"
    assert line.values["reference_accuracy"] == 1.0
    assert line.values["engine_accuracy"] == 0.5
    assert (line.values["only_reference"], line.values["only_engine"]) == (1, 0)


def test_an_accuracy_limit_is_held(recording):
    a, b = fakes.CAPTIONS
    worse = played(recording, [a, b], [a, WRONG])
    assert check_prompt_accuracy(worse, Limits(prompt_accuracy_drop=0.4))[0].status == "failed"
    assert check_prompt_accuracy(worse, Limits(prompt_accuracy_drop=0.5))[0].status == "passed"


def test_a_picture_that_was_not_made_counts_as_wrong(recording):
    first = played(recording, list(fakes.CAPTIONS), list(fakes.CAPTIONS))[0]
    lost = dataclasses.replace(first, image=None, error="crashed")
    (line,) = check_prompt_accuracy([lost], Limits(prompt_accuracy_drop=0.1))
    assert line.status == "failed"


def test_a_model_without_a_recogniser_says_so(recording):
    other = fakes.make_recording(("an oil painting of a cat",))
    line = by_name(judge(other))["prompt_accuracy"]
    assert line.status == "info" and "no recogniser" in line.message


def test_an_accuracy_limit_that_cannot_be_judged_is_not_a_pass():
    other = fakes.make_recording(("an oil painting of a cat",))
    limits = Limits(psnr_db=50, prompt_accuracy_drop=0.1)
    assert by_name(judge(other, image_limits=limits))["prompt_accuracy"].status == "failed"
