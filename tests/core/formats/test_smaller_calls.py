"""Cut calls are legal calls of the contract, and hold the beginning of what they were cut from."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.formats import smaller_calls
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

LATENT = (AxisRef("batch"), 4, AxisRef("height", 8), AxisRef("width", 8))


def contract(low: int) -> Contract:
    return Contract(
        "unet",
        (TensorSpec("sample", "float32", LATENT), TensorSpec("text", "float32", (7, 3))),
        (TensorSpec("model_output", "float32", LATENT),),
        (Axis("batch", 1, 1, 4), *(Axis(n, low, 512, 1024, 64) for n in ("height", "width"))),
    )


def feeds(batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "sample": draw.standard_normal((batch, 4, height // 8, width // 8), np.float32),
        "text": draw.standard_normal((7, 3), np.float32),
    }


def test_a_large_call_becomes_one_small_picture() -> None:
    whole, ours = feeds(2, 512, 768), contract(64)
    shape = smaller_calls.smaller_shape(ours, ours.check_feeds(whole))
    assert shape == {"batch": 1, "height": 256, "width": 256}
    found = smaller_calls.cut(whole, ours, shape)
    assert ours.check_feeds(found) == shape
    np.testing.assert_array_equal(found["sample"], whole["sample"][:1, :, :32, :32])
    np.testing.assert_array_equal(found["text"], whole["text"])


def test_it_never_leaves_the_axes() -> None:
    ours = contract(384)
    shape = smaller_calls.smaller_shape(ours, {"batch": 1, "height": 512, "width": 448})
    assert shape == {"batch": 1, "height": 384, "width": 384}


@pytest.mark.parametrize(("values", "large"), [(4_500_000, False), (860_000_000, True)])
def test_what_is_large_counts_weights_and_pixels(values: int, large: bool) -> None:
    ours = contract(64)
    assert (
        smaller_calls.is_large(values, ours, feeds(1, 512, 512) if large else feeds(1, 64, 64))
        is large
    )
