"""From calls to ranges."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.compression.ranges import SAMPLES_PER_CALL, Seen, span_of
from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import grid_of


def seen_of(*arrays, axis=-1) -> Seen:
    seen = Seen(axis)
    for array in arrays:
        seen.add(np.asarray(array, np.float32))
    return seen


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 3, 5, 4)), (-1, (2, 7, 3))])
def test_extremes_and_channel_means_are_over_all_calls(axis, shape):
    rng = np.random.default_rng(0)
    calls = [rng.normal(size=shape).astype(np.float32) + i for i in range(3)]
    seen = seen_of(*calls, axis=axis)
    everything = np.stack(calls)
    assert (seen.low, seen.high) == (everything.min(), everything.max())
    moved = np.moveaxis(everything, axis if axis < 0 else axis + 1, -1)
    np.testing.assert_allclose(seen.mean, moved.reshape(-1, 3).mean(axis=0), rtol=1e-5)
    assert not seen.constant


def test_samples_of_a_large_value_are_few_and_of_every_channel():
    channels = 64
    value = np.broadcast_to(np.arange(channels), (4000, channels))
    (samples,) = seen_of(value).samples
    assert SAMPLES_PER_CALL / 4 < len(samples) <= SAMPLES_PER_CALL
    assert set(samples) == set(range(channels))


def test_no_call_has_no_mean():
    with pytest.raises(StageError, match="at least one call"):
        _ = Seen(1).mean


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_a_constant_is_its_own_range(method):
    seen = seen_of(np.full((2, 3), 2.5))
    assert seen.constant
    span = span_of(seen, method, 99.9, False)
    assert (span.low, span.high) == (2.5, 2.5)
    assert grid_of(span).scale > 0


def rounding_error(values, span):
    grid = grid_of(span)
    steps = np.clip(np.rint(values / grid.scale) + grid.zero_point, 0, 255)
    return np.square((steps - grid.zero_point) * grid.scale - values).mean()


def test_one_outlier_widens_minmax_only():
    values = np.random.default_rng(0).normal(size=8001).astype(np.float32)
    values[4] = 40.0
    seen = seen_of(values.reshape(-1, 9))
    full = span_of(seen, "minmax", 99.9, False)
    cut = span_of(seen, "percentile", 99.9, False)
    best = span_of(seen, "mse", 99.9, False)
    assert full.high == 40 and cut.high < 5 and -5 < cut.low < -2
    assert best.high <= full.high
    assert rounding_error(values, best) <= rounding_error(values, full)
    heavy = np.concatenate([np.random.default_rng(1).normal(size=8000), [12.0]])
    narrow = span_of(seen_of(heavy), "mse", 99.9, True)
    assert narrow.high < 12
