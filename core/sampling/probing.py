"""Builds step tables from diffusers' own schedulers, by probing them with basis vectors.

A scheduler without clipping is linear in what it is given: latents, model outputs, noise. So it
is run once per number of steps on a latent whose channels are a basis: at call k the latent is
the unit vector of latent k, the model output that of output k, the noise that of noise k. What
`step` returns then spells out its coefficients, and whatever it remembers between calls (older
outputs, older latents) shows up under the name of where it came from.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffoundry.errors import ModelError
from diffoundry.formats.step_table import SchedulerTables, StepTable
from diffoundry.sampling.sampler import sample
from diffoundry.sampling.schedulers import SCHEDULERS, Scheduler, own_scheduler
from diffoundry.types import Array

# TCDScheduler's own default (its paper's gamma); StableDiffusionPipeline's 0 is meant for DDIM.
TCD_ETA = 0.3
# Schedulers compute in float32, so a deviation beyond this is not rounding.
LINEAR_TOLERANCE = 1e-4


def probe_scheduler(
    name: str, own_config: Mapping[str, Any], pipeline_class: str, default: bool = False
) -> SchedulerTables:
    """All tables of one scheduler for a pipeline; `own_config` is its scheduler_config.json.

    Raises ModelError when the scheduler clips, thresholds, cannot run this configuration (epsilon
    prediction from zero terminal signal-to-noise ratio), or is not linear after all.
    """
    scheduler = make_scheduler(name, own_config, pipeline_class)
    tables, left_out = {}, {}
    for steps in range(1, SCHEDULERS[name].max_steps + 1):
        try:
            tables[steps] = probe(name, scheduler, steps)
        except _CountRefusedError as error:
            left_out[steps] = str(error)
    if not tables:
        raise _refusal(scheduler, "settings that it can run", next(iter(left_out.values())))
    _check_linear(scheduler, tables[min(tables, key=lambda steps: abs(steps - 8))])
    settings = {"class": type(scheduler).__name__, **_settings(scheduler)}
    # For the record only, and JSON has no infinity (DPM-Solver's lambda_min_clipped).
    settings = {
        key: str(value) if value in (float("inf"), float("-inf")) else value
        for key, value in settings.items()
    }
    return SchedulerTables(name, default, tables, settings, left_out)


def make_scheduler(name: str, own_config: Mapping[str, Any], pipeline_class: str) -> Any:
    """The diffusers scheduler `name` with the settings that the pipeline class really uses.

    The pipeline's own scheduler is made as from_pretrained makes it, then adapted as
    StableDiffusionPipeline.__init__ does; another one is made by `from_config` of that, and
    adapted in its turn (a PNDM configuration does not say that DDIM must not clip).
    Raises ModelError when it clips or thresholds.
    """
    import diffusers

    own_class = getattr(diffusers, str(own_config.get("_class_name")), None)
    if own_class is None or not hasattr(own_class, "from_config"):
        raise ModelError(
            "scheduler/scheduler_config.json",
            expected="the name of a diffusers scheduler in _class_name",
            found=str(own_config.get("_class_name")),
            remedy="save the pipeline again with one of diffusers' schedulers",
        )
    wanted = SCHEDULERS[name]
    with quiet(), _build_errors(name):
        own = _adapted(own_class.from_config(dict(own_config)), pipeline_class)
        scheduler = own
        if own_scheduler(own_config) != name:
            scheduler = _adapted(_other(wanted, own.config), pipeline_class)
    for setting in ("clip_sample", "thresholding"):
        if _settings(scheduler).get(setting):
            raise _refusal(scheduler, f"{setting}: false (tables are linear)", f"{setting}: true")
    return scheduler


def _adapted(scheduler: Any, pipeline_class: str) -> Any:
    """Change settings after construction, as StableDiffusionPipeline.__init__ does."""
    from diffusers.configuration_utils import FrozenDict

    if pipeline_class != "StableDiffusionPipeline":
        return scheduler
    config = dict(scheduler.config)
    if config.get("steps_offset", 1) != 1:
        config["steps_offset"] = 1
    if config.get("clip_sample", False) is True:
        config["clip_sample"] = False
    scheduler._internal_dict = FrozenDict(config)
    return scheduler


def _other(wanted: Scheduler, config: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, wanted.class_name).from_config(config, **wanted.overrides)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out numpy's warning about how diffusers' schedulers make arrays of tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield


class _CountRefusedError(Exception):
    """diffusers' scheduler does not take this number of steps."""


@contextlib.contextmanager
def _build_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(
            f"scheduler {name} for this model",
            expected="a configuration that diffusers accepts",
            found=str(error),
            remedy="correct scheduler/scheduler_config.json",
        ) from error


@dataclass
class _Noise:
    """What the patched randn_tensor returns next, and how often it was asked."""

    value: Any = None
    draws: int = 0

    def draw(self, *args: Any, **kwargs: Any) -> Any:
        self.draws += 1
        return self.value


@contextlib.contextmanager
def injected_noise(scheduler: Any) -> Iterator[_Noise]:
    """While inside, `scheduler` takes its per-step noise from the yielded object's `value`."""
    module = sys.modules[type(scheduler).__module__]
    source = _Noise()
    original = getattr(module, "randn_tensor", None)
    if original is None:
        yield source
        return
    module.randn_tensor = source.draw  # type: ignore[attr-defined]
    try:
        yield source
    finally:
        module.randn_tensor = original  # type: ignore[attr-defined]


def step_options(scheduler: Any) -> dict[str, float]:
    """Keyword arguments of `step` that the tables are made with."""
    return {"eta": TCD_ETA} if type(scheduler).__name__ == "TCDScheduler" else {}


def probe(name: str, scheduler: Any, steps: int) -> StepTable:
    """The table of `scheduler` (not changed) at `steps` steps. Raises ModelError."""
    import torch

    scheduler = copy.deepcopy(scheduler)
    with quiet(), injected_noise(scheduler) as noise:
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError) as error:
            raise _CountRefusedError(f"diffusers refuses {steps} steps: {error}") from error
        timesteps = scheduler.timesteps
        calls = len(timesteps)
        basis = torch.eye(3 * calls, dtype=torch.float64)[:, None, :, None, None]
        scales, rows = np.zeros(calls), np.zeros((calls, 3 * calls))
        for k, t in enumerate(timesteps):
            scaled = scheduler.scale_model_input(basis[k], t).flatten()
            scales[k] = float(scaled[k])
            noise.value = basis[2 * calls + k]
            following = scheduler.step(
                basis[calls + k], t, basis[k], **step_options(scheduler), return_dict=False
            )[0]
            rows[k] = following.flatten().to(torch.float64).numpy()
    if not (np.isfinite(rows).all() and np.isfinite(scales).all()):
        raise _refusal(
            scheduler,
            "finite coefficients",
            f"infinite ones at {steps} steps (rescale_betas_zero_snr with "
            f"{scheduler.config.prediction_type} prediction?)",
        )
    return _table(name, steps, float(scheduler.init_noise_sigma), timesteps, scales, rows)


def _table(
    name: str, steps: int, sigma: float, timesteps: Any, scales: Array, rows: Array
) -> StepTable:
    """Rows over (latents, outputs, noises) by call -> columns by age, trimmed to what is used."""
    calls = len(rows)
    latents, outputs, noises = (rows[:, i * calls : (i + 1) * calls] for i in range(3))
    return StepTable(
        name,
        steps,
        sigma,
        timesteps=np.asarray(timesteps, dtype=np.float32),
        input_scales=scales.astype(np.float32),
        latent_coefficients=_by_age(latents),
        output_coefficients=_by_age(outputs),
        noise_coefficients=np.diagonal(noises).astype(np.float32),
    )


def _by_age(coefficients: Array) -> Array:
    """[calls, calls] by call -> float32 [calls, history] by age, zero columns at the end cut."""
    aged = np.zeros_like(coefficients)
    for k, row in enumerate(coefficients):
        aged[k, : k + 1] = row[k::-1]
    used = np.flatnonzero(aged.any(axis=0))
    return np.ascontiguousarray(aged[:, : int(used[-1]) + 1 if len(used) else 1], np.float32)


def run_scheduler(
    scheduler: Any, steps: int, initial: Array, predict: Any, noise: Array | None = None
) -> Array:
    """diffusers' own loop, in torch, with injected noise: what a table is held against.

    `predict` and `noise` are as in `sample`; arrays keep the dtype of `initial`.
    """
    import torch

    scheduler = copy.deepcopy(scheduler)
    with quiet(), injected_noise(scheduler) as source:
        scheduler.set_timesteps(steps)
        latent = torch.from_numpy(initial) * scheduler.init_noise_sigma
        for k, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latent, t)
            output = torch.from_numpy(predict(scaled.numpy(), float(t), k))
            source.value = None if noise is None else torch.from_numpy(noise[k])
            options = step_options(scheduler)
            latent = scheduler.step(output, t, latent, **options, return_dict=False)[0]
    return latent.numpy()


def _check_linear(scheduler: Any, table: StepTable) -> None:
    """Run large values through both: clipping that no setting names shows here."""
    generator = np.random.Generator(np.random.PCG64(0))
    initial = generator.standard_normal((1, 2, 4, 4))
    outputs, noise = 50.0 * generator.standard_normal((2, table.calls, *initial.shape))
    expected = run_scheduler(scheduler, table.steps, initial, lambda x, t, k: outputs[k], noise)
    found = sample(table, initial, lambda x, t, k: outputs[k], noise)
    deviation = np.abs(found - expected).max() / np.abs(expected).max()
    if not deviation <= LINEAR_TOLERANCE:
        raise _refusal(
            scheduler,
            "a scheduler that is linear",
            f"a deviation of {deviation:.1e} from its table",
        )


def _settings(scheduler: Any) -> dict[str, Any]:
    """What the scheduler itself is configured with (its config also keeps what others take)."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in sorted(scheduler.config.items()) if key in own}


def _refusal(scheduler: Any, expected: str, found: str) -> ModelError:
    return ModelError(
        f"{type(scheduler).__name__} with this model's scheduler_config.json",
        expected=expected,
        found=found,
        remedy="change scheduler/scheduler_config.json, or use another scheduler",
    )
