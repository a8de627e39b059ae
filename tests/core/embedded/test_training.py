"""The training code agrees with what diffusers computes at inference."""

import copy
from pathlib import Path

import pytest
import torch

from diffoundry.embedded.networks import GUIDANCE_WIDTH, NOISE_SCHEDULE, build_unet
from diffoundry.embedded.prompts import load_split
from diffoundry.embedded.train import train
from diffoundry.embedded.train_lcm import (
    boundary_scalings,
    clean_from,
    embed_guidance,
    jump_length,
    start_student,
)
from diffoundry.embedded.train_teacher import signal_levels, timestep_odds
from diffoundry.embedded.training import Phase, Settings, follow
from diffoundry.embedded.vocabulary import WORDS, build_merges, byte_alphabet


def test_the_guidance_embedding_is_the_pipelines() -> None:
    from diffusers import LatentConsistencyModelPipeline as Pipeline

    w = torch.tensor([0.0, 0.5, 2.0, 6.0])
    theirs = Pipeline.get_guidance_scale_embedding(None, w, embedding_dim=GUIDANCE_WIDTH)
    # The angles reach 6000 radians, where float32 resolves 5e-4.
    assert torch.allclose(embed_guidance(w), theirs, atol=1e-3)


def test_the_boundary_scalings_are_the_schedulers() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(**NOISE_SCHEDULE)
    timesteps = torch.tensor([0, 19, 499, 999])
    ours = zip(*(part.flatten().tolist() for part in boundary_scalings(timesteps)), strict=True)
    for t, pair in zip(timesteps.tolist(), ours, strict=True):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert pair == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_clean_from_undoes_add_noise() -> None:
    from diffusers import LCMScheduler

    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 16, 16, generator=generator)
    t = torch.tensor([19, 499, 999])
    noisy = LCMScheduler(**NOISE_SCHEDULE).add_noise(clean, noise, t)
    level = signal_levels("cpu")[t].view(-1, 1, 1, 1)
    assert torch.allclose(clean_from(noisy, noise, level), clean, atol=1e-4)


def test_the_student_starts_as_its_teacher_whatever_the_guidance() -> None:
    torch.manual_seed(0)
    teacher = build_unet(guidance_embedding=False).eval()
    student = start_student(teacher).eval()
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 96)
    t = torch.tensor([19, 999])
    condition = embed_guidance(torch.tensor([0.0, 5.0]))
    with torch.no_grad():
        wanted = teacher(sample, t, text).sample
        got = student(sample, t, text, timestep_cond=condition).sample
    assert torch.allclose(got, wanted, atol=1e-5)


def test_noisy_timesteps_are_trained_more_often_and_none_is_left_out() -> None:
    odds = timestep_odds(signal_levels("cpu"))
    assert odds.sum().item() == pytest.approx(1, abs=1e-5)
    assert (odds.diff() > 0).all()
    assert odds[0] > 0.5 / 1000


def test_jumps_grow_shorter() -> None:
    jumps = [jump_length(i / 100) for i in range(100)]
    assert jumps == sorted(jumps, reverse=True)
    assert jumps[-1] == 1


def test_the_alphabet_covers_every_byte_once_and_merges_end_in_whole_words() -> None:
    assert len(set(byte_alphabet())) == 256
    made = {left + right for left, right in build_merges()}
    assert {f"{word}</w>" for word in WORDS} <= made


def linear_phase(folder: Path, steps: int) -> Phase:
    torch.manual_seed(1)
    layer = torch.nn.Linear(3, 1)
    average = copy.deepcopy(layer).requires_grad_(False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=200)
    return Phase("linear", folder, steps, {"it": layer}, optimizer, schedule, {"it": average})


def train_linear(phase: Phase) -> None:
    phase.resume()
    while phase.step < phase.steps:
        batch = torch.randn(8, 3)
        loss = (phase.modules["it"](batch) - batch.sum(1, keepdim=True)).square().mean()
        phase.take_step(loss, 0.9)


def test_a_phase_that_was_stopped_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = linear_phase(tmp_path / "whole", 60)
    train_linear(whole)
    for steps in (25, 60):
        resumed = linear_phase(tmp_path / "parts", steps)
        train_linear(resumed)
    for kind in ("modules", "averages"):
        expected = getattr(whole, kind)["it"].state_dict()
        for key, value in getattr(resumed, kind)["it"].state_dict().items():
            assert torch.equal(value, expected[key]), (kind, key)
    assert [record["step"] for record in resumed.records] == [25, 50, 60]


def test_an_average_follows_its_module() -> None:
    average, module = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = average.weight.detach().clone()
    follow(average.requires_grad_(False), module, decay=0.75)
    assert torch.allclose(average.weight, 0.75 * before + 0.25 * module.weight)


@pytest.mark.slow
def test_all_phases_run_and_export_a_pipeline_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import LatentConsistencyModelPipeline

    short = dict.fromkeys(
        ("vae_steps", "vae_edge_steps", "text_steps", "teacher_steps", "lcm_steps"), 2
    )
    settings = Settings(**short, lcm_more_steps=2, cached_scenes=64, vae_batch=4, ends_pool=1)
    few = load_split("tuning")[:2]
    monkeypatch.setattr("diffoundry.embedded.train.load_split", lambda name: few)
    train(tmp_path / "work", tmp_path / "out", settings)
    pipeline = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    picture = pipeline(few[0].prompt, height=64, width=64, num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    assert (tmp_path / "work" / "teacher" / "unet" / "config.json").exists()
