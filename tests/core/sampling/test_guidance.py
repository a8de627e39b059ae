"""Guidance in numpy is diffusers' guidance."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.sampling.guidance import combine, guidance_embedding


@pytest.mark.parametrize("width", [16, 64, 255, 256])
@pytest.mark.parametrize("guidance", [1.0, 1.5, 2.0, 4.0, 8.0, 14.0])
def test_the_embedding_is_that_of_the_latent_consistency_pipeline(
    guidance: float, width: int
) -> None:
    import torch
    from diffusers import LatentConsistencyModelPipeline

    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor(guidance - 1).repeat(2), embedding_dim=width
    ).numpy()
    found = guidance_embedding(guidance, width, batch=2)
    assert found.dtype == np.float32 and found.shape == expected.shape == (2, width)
    # One bit of a frequency moves an angle by 1000·w·2^-24.
    assert np.abs(found - expected).max() <= 2 * 1000 * (guidance - 1) * 2**-24 + 1e-6


def test_classifier_free_guidance_starts_at_the_unconditional_prediction() -> None:
    unconditional, conditional = np.array([1.0, 2.0]), np.array([3.0, 0.0])
    assert np.array_equal(combine(unconditional, conditional, 1.0), conditional)
    assert np.array_equal(combine(unconditional, conditional, 3.0), [7.0, -4.0])
