"""The one sampler: runs any scheduler's step table, in numpy."""

from __future__ import annotations

from collections.abc import Callable

from diffoundry.errors import ContractError
from diffoundry.formats.step_table import StepTable
from diffoundry.types import Array

Predict = Callable[[Array, float, int], Array]
"""(scaled latent, timestep, index of the call) -> model output of the latent's shape."""


def sample(table: StepTable, initial: Array, predict: Predict, noise: Array | None = None) -> Array:
    """Run the denoising loop; the result has the shape and dtype of `initial`.

    initial: unit normal noise [batch, channels, height/f, width/f]. noise: unit normal noise
    [calls, *initial.shape], needed only where the table adds noise (draws after the last such
    call may be absent). Raises ContractError when it is missing or does not fit.
    """
    _check_noise(table, initial, noise)
    latents = [initial * table.init_noise_sigma]
    outputs: list[Array] = []
    for k in range(table.calls):
        scaled = latents[0] * float(table.input_scales[k])
        outputs.insert(0, predict(scaled, float(table.timesteps[k]), k))
        following = _combine(table.latent_coefficients[k], latents)
        following = following + _combine(table.output_coefficients[k], outputs)
        if table.noise_coefficients[k] and noise is not None:
            following = following + float(table.noise_coefficients[k]) * noise[k]
        latents = [following, *latents][: table.latent_coefficients.shape[1]]
        outputs = outputs[: table.output_coefficients.shape[1] - 1]
    return latents[0]


def _combine(coefficients: Array, history: list[Array]) -> Array:
    """Sum of coefficient × array, newest first; early calls have less history than columns."""
    pairs = zip(coefficients, history, strict=False)
    # A zero is skipped, not multiplied: a history that is not used must not bring in its NaN.
    terms = [float(coefficient) * array for coefficient, array in pairs if coefficient]
    return sum(terms[1:], terms[0]) if terms else history[0] * 0.0


def _check_noise(table: StepTable, initial: Array, noise: Array | None) -> None:
    if not table.needs_noise:
        return
    draws = int(table.noise_coefficients.nonzero()[0][-1]) + 1
    if noise is None or noise.shape[1:] != initial.shape or len(noise) < draws:
        raise ContractError(
            f"noise for {table.steps} steps of {table.scheduler}",
            expected=f"[{draws} or more, {', '.join(str(size) for size in initial.shape)}]",
            found="nothing" if noise is None else str(list(noise.shape)),
            remedy="draw it with draw_step_noise(seed, table.calls, shape)",
        )
