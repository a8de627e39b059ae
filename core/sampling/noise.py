"""Noise from a seed, the same on every machine: numpy's PCG64, float32, standard normal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffoundry.types import Array

# Separate streams of one seed: the number of steps does not change the initial latent.
_INITIAL, _STEPS = 0, 1


def draw_initial(seed: int, shape: Sequence[int]) -> Array:
    """Unit normal initial latent of `shape` [batch, channels, height/f, width/f], float32."""
    return _generator(seed, _INITIAL).standard_normal(tuple(shape), dtype="float32")


def draw_step_noise(seed: int, steps: int, shape: Sequence[int]) -> Array:
    """Unit normal noise [steps, *shape], float32; `steps` counts calls of the model.

    The first n draws of a longer run are those of a run of n.
    """
    return _generator(seed, _STEPS).standard_normal((steps, *shape), dtype="float32")


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, stream]))
