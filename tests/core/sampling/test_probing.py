"""Every supported scheduler's table does what diffusers' own scheduler does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffoundry.errors import ModelError
from diffoundry.sampling.probing import (
    injected_noise,
    make_scheduler,
    probe,
    probe_scheduler,
    quiet,
    run_scheduler,
)
from diffoundry.sampling.sampler import sample
from diffoundry.sampling.schedulers import SCHEDULERS

SD = "StableDiffusionPipeline"
LCM = "LatentConsistencyModelPipeline"
SETTINGS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SETTINGS}
LCM_OWN = {"_class_name": "LCMScheduler", **SETTINGS}
COUNTS = (1, 2, 4, 8, 20, 50)
# Runs in float32 end at different roundings: 1e-5 of the latent's size is the promise.
TOLERANCE = 1e-5


def toy_model(x: np.ndarray, t: float, k: int) -> np.ndarray:
    """Not linear, and different at every timestep."""
    return (np.tanh(0.7 * x + t / 1000) + 0.3 * np.roll(x, 1, axis=-1)).astype(x.dtype)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype="float32")


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def own(name: str, **more: Any) -> dict[str, Any]:
    return {**(LCM_OWN if SCHEDULERS[name].consistency else PNDM), **more}


def pipeline_of(name: str) -> str:
    return LCM if SCHEDULERS[name].consistency else SD


def compare(scheduler: Any, name: str, steps: int) -> float:
    table = probe(name, scheduler, steps)
    initial = draw(1, 2, 3, 4, 4)
    noise = draw(2, table.calls, *initial.shape)
    expected = run_scheduler(scheduler, steps, initial, toy_model, noise)
    found = sample(table, initial, toy_model, noise)
    assert found.dtype == expected.dtype == np.float32
    return deviation(found, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_table_runs_as_diffusers_own_scheduler(name: str, prediction_type: str) -> None:
    scheduler = make_scheduler(name, own(name, prediction_type=prediction_type), pipeline_of(name))
    for steps in (count for count in COUNTS if count <= SCHEDULERS[name].max_steps):
        assert compare(scheduler, name, steps) < TOLERANCE, steps


@pytest.mark.parametrize("name", [name for name, one in SCHEDULERS.items() if not one.consistency])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_table_follows_the_models_timestep_spacing(name: str, spacing: str) -> None:
    scheduler = make_scheduler(name, own(name, timestep_spacing=spacing), SD)
    assert scheduler.config.timestep_spacing == spacing
    assert compare(scheduler, name, 7) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_count_of_the_range_has_a_table(name: str) -> None:
    tables = probe_scheduler(name, own(name), pipeline_of(name))
    assert list(tables.tables) == list(range(1, SCHEDULERS[name].max_steps + 1))
    assert not tables.left_out


@pytest.mark.parametrize(
    ("name", "draws"), [("lcm", 3), ("tcd", 3), ("euler_ancestral", 3), ("ddim", 0)]
)
def test_noise_is_added_at_all_but_the_last_of_four_steps(name: str, draws: int) -> None:
    table = probe(name, make_scheduler(name, own(name), pipeline_of(name)), 4)
    assert np.count_nonzero(table.noise_coefficients) == draws
    assert table.needs_noise == bool(draws)
    assert table.noise_coefficients[-1] == 0


def test_the_step_noise_changes_the_result() -> None:
    table = probe("lcm", make_scheduler("lcm", LCM_OWN, LCM), 4)
    initial, noise = draw(1, 1, 2, 4, 4), draw(2, 4, 1, 2, 4, 4)
    assert deviation(sample(table, initial, toy_model, -noise), sample(
        table, initial, toy_model, noise
    )) > 0.1  # fmt: skip


def test_pndm_says_that_it_calls_the_model_once_more_than_it_has_steps() -> None:
    assert probe("pndm", make_scheduler("pndm", PNDM, SD), 10).calls == 11


def test_lcm_honours_original_inference_steps() -> None:
    few = make_scheduler("lcm", {**LCM_OWN, "original_inference_steps": 20}, LCM)
    usual = make_scheduler("lcm", LCM_OWN, LCM)
    assert list(probe("lcm", few, 4).timesteps) == [999, 749, 499, 249]
    assert list(probe("lcm", usual, 4).timesteps) == [999, 759, 499, 259]


def test_counts_that_diffusers_refuses_are_left_out_with_its_reason() -> None:
    tables = probe_scheduler("lcm", {**LCM_OWN, "original_inference_steps": 5}, LCM)
    assert list(tables.tables) == [1, 2, 3, 4, 5]
    assert sorted(tables.left_out) == [6, 7, 8]
    assert "original_steps" in tables.left_out[6]


def test_pndm_with_runge_kutta_steps_starts_at_four() -> None:
    config = {**PNDM, "skip_prk_steps": False}
    tables = probe_scheduler("pndm", config, SD)
    assert min(tables.tables) == 4
    assert compare(make_scheduler("pndm", config, SD), "pndm", 10) < TOLERANCE


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpmpp_2m"])
def test_settings_are_those_that_stable_diffusion_pipeline_uses(name: str) -> None:
    from diffusers import StableDiffusionPipeline

    config = {**PNDM, "_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True}
    found = make_scheduler(name, config, SD)
    with quiet(), pytest.warns(FutureWarning):
        real = StableDiffusionPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=None,
            scheduler=type(found).from_config(config, **SCHEDULERS[name].overrides),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).scheduler
    assert found.config.steps_offset == 1
    assert not found.config.get("clip_sample")
    initial, noise = draw(1, 1, 2, 4, 4), draw(2, 9, 1, 2, 4, 4)
    found_latent = sample(probe(name, found, 8), initial, toy_model, noise)
    assert deviation(found_latent, run_scheduler(real, 8, initial, toy_model, noise)) < TOLERANCE


def test_latent_consistency_pipeline_does_not_adapt_its_scheduler() -> None:
    assert make_scheduler("lcm", {**LCM_OWN, "steps_offset": 0}, LCM).config.steps_offset == 0


@pytest.mark.parametrize(
    ("name", "setting"), [("lcm", "clip_sample"), ("lcm", "thresholding"), ("ddim", "thresholding")]
)
def test_clipping_is_refused_by_name(name: str, setting: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)Scheduler.*{setting}: true"):
        probe_scheduler(name, own(name, **{setting: True}), pipeline_of(name))


def test_clipping_that_no_setting_names_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    step = DDIMScheduler.step

    def clipping_step(self: Any, *args: Any, **options: Any) -> Any:
        return (step(self, *args, **options)[0].clamp(-2, 2),)

    monkeypatch.setattr(DDIMScheduler, "step", clipping_step)
    with pytest.raises(ModelError, match="linear"):
        probe_scheduler("ddim", own("ddim", _class_name="DDIMScheduler"), SD)


def test_zero_terminal_snr_runs_with_v_prediction_and_is_refused_with_epsilon() -> None:
    config = own("ddim", _class_name="DDIMScheduler", rescale_betas_zero_snr=True)
    config = {**config, "timestep_spacing": "trailing"}
    scheduler = make_scheduler("ddim", {**config, "prediction_type": "v_prediction"}, SD)
    assert compare(scheduler, "ddim", 4) < TOLERANCE
    with pytest.raises(ModelError, match="rescale_betas_zero_snr with epsilon"):
        probe_scheduler("ddim", config, SD)


def test_an_unknown_own_scheduler_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="MagicScheduler"):
        make_scheduler("ddim", {**PNDM, "_class_name": "MagicScheduler"}, SD)


def test_probing_leaves_the_noise_source_of_diffusers_as_it_was() -> None:
    from diffusers.schedulers import scheduling_lcm

    before = scheduling_lcm.randn_tensor
    scheduler = make_scheduler("lcm", LCM_OWN, LCM)
    with pytest.raises(KeyError), injected_noise(scheduler):
        assert scheduling_lcm.randn_tensor is not before
        raise KeyError
    assert scheduling_lcm.randn_tensor is before
