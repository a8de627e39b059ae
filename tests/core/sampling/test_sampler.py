"""The sampler, its noise and the choice of schedulers, without torch."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from diffoundry.errors import ContractError, UsageError
from diffoundry.formats.step_table import StepTable
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sampling.sampler import sample
from diffoundry.sampling.schedulers import check_steps, fitting, own_scheduler, scheduler_named


def table(noise: tuple[float, float] = (0.0, 0.0)) -> StepTable:
    """Two calls: 2·x0 − m0, then x1 + 3·x0 + m1 + 5·m0."""
    return StepTable(
        "made_up",
        steps=2,
        init_noise_sigma=10.0,
        timesteps=np.array([7, 3], "float32"),
        input_scales=np.array([0.5, 1.0], "float32"),
        latent_coefficients=np.array([[2, 0], [1, 3]], "float32"),
        output_coefficients=np.array([[-1, 0], [1, 5]], "float32"),
        noise_coefficients=np.array(noise, "float32"),
    )


def test_the_loop_scales_inputs_and_combines_latents_outputs_and_noise() -> None:
    seen = []

    def predict(x: np.ndarray, t: float, k: int) -> np.ndarray:
        seen.append((float(x[0]), t, k))
        return np.full_like(x, 100.0 * (k + 1))

    result = sample(table((0.0, 2.0)), np.ones(1, "float32"), predict, np.array([[4.0], [6.0]]))
    # x0 = 10; x1 = 2·10 − 100 = −80; x2 = −80 + 3·10 + 200 + 5·100 + 2·6
    assert seen == [(5.0, 7.0, 0), (-80.0, 3.0, 1)]
    assert result == 662.0


def test_the_loop_keeps_float32() -> None:
    result = sample(table(), np.ones((1, 2, 2, 2), "float32"), lambda x, t, k: x)
    assert result.dtype == np.float32


@pytest.mark.parametrize("noise", [None, np.zeros((1, 1), "float32"), np.zeros((2, 3), "float32")])
def test_missing_or_misshapen_noise_is_refused(noise: np.ndarray | None) -> None:
    with pytest.raises(ContractError, match="2 or more"):
        sample(table((0.0, 1.0)), np.ones(1, "float32"), lambda x, t, k: x, noise)


def test_noise_after_the_last_step_that_adds_some_may_be_absent() -> None:
    sample(table((1.0, 0.0)), np.ones(1, "float32"), lambda x, t, k: x, np.zeros((1, 1), "float32"))


def test_noise_is_the_same_everywhere() -> None:
    expected = [-1.2224977, -2.1383154, -0.06472305]
    assert draw_initial(5, (1, 1, 1, 3)).dtype == np.float32
    assert draw_initial(5, (1, 1, 1, 3)).ravel() == pytest.approx(expected)


def test_more_steps_do_not_change_earlier_noise_and_the_initial_latent_has_its_own() -> None:
    shape = (1, 2, 3, 3)
    assert np.array_equal(draw_step_noise(1, 8, shape)[:3], draw_step_noise(1, 3, shape))
    assert not np.array_equal(draw_step_noise(1, 1, shape)[0], draw_initial(1, shape))
    assert not np.array_equal(draw_initial(1, shape), draw_initial(2, shape))


def facts(is_lcm: bool = False, width: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(is_lcm=is_lcm, guidance_embedding_dim=width)


def test_a_consistency_model_takes_lcm_and_tcd() -> None:
    for model in (facts(is_lcm=True), facts(width=256)):
        fits = fitting(model, {"_class_name": "DDIMScheduler"})
        assert (fits.names, fits.default) == (("lcm", "tcd"), "lcm")


@pytest.mark.parametrize(
    ("config", "default"),
    [
        ({"_class_name": "PNDMScheduler"}, "pndm"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "dpmpp_2m_karras",
        ),
        ({"_class_name": "HeunDiscreteScheduler"}, "ddim"),
    ],
)
def test_other_models_default_to_their_own_scheduler(
    config: dict[str, object], default: str
) -> None:
    fits = fitting(facts(), config)
    assert fits.default == default
    assert len(fits.names) == 7 and not {"lcm", "tcd"} & set(fits.names)


def test_a_solver_with_other_settings_is_not_taken_for_dpmpp_2m() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
    assert own_scheduler(config) is None


def test_unknown_schedulers_and_counts_are_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="dpmpp_2m_karras"):
        scheduler_named("heun")
    with pytest.raises(UsageError, match="1 to 8 steps"):
        check_steps("lcm", 9)
    with pytest.raises(UsageError, match="1 to 50 steps"):
        check_steps("euler", 0)
    check_steps("euler", 50)


def test_sampling_and_generation_import_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, diffoundry.generation, diffoundry.stages.step_tables\n"
        "from diffoundry.sampling import guidance, noise, sampler, schedulers\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
