"""Which calls float16 is tried on: all of a small model's, one that is cut of a large one's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffoundry.exporters import fp16_calls
from diffoundry.exporters.fp16_calls import calls_to_measure
from diffoundry.formats import smaller_calls
from tests.compilers import small_network as small


def test_calls_are_spread_over_the_recording(tmp_path: Path) -> None:
    measured = calls_to_measure(small.make_recording(tmp_path).path, small.CONTRACT, 2, 48, 1000)
    assert measured.max_trials == 48
    for feeds, seed in zip(measured.calls, (0, 2), strict=True):
        np.testing.assert_array_equal(feeds["sample"], small.feeds_at(seed=seed)["sample"])


def test_a_large_model_has_one_call_cut_to_a_legal_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smaller_calls, "LARGE", 1e6)
    monkeypatch.setattr(smaller_calls, "PIXELS", 12 * 12)
    recording = small.make_recording(tmp_path)
    measured = calls_to_measure(recording.path, small.CONTRACT, 2, 48, 1_000_000)
    assert len(measured.calls) == 1 and measured.max_trials == fp16_calls.TRIALS
    (feeds,), (shape,) = measured.calls, measured.shapes
    assert small.CONTRACT.check_feeds(feeds) == shape
    axes = {axis.name: axis for axis in small.CONTRACT.axes}
    for name in ("height", "width"):
        assert axes[name].min <= shape[name] <= max(12, axes[name].min)
    whole = small.feeds_at(seed=1)["sample"]
    rows, columns = feeds["sample"].shape[2:]
    assert (rows, columns) < whole.shape[2:]
    np.testing.assert_array_equal(feeds["sample"], whole[:1, :, :rows, :columns])


def test_a_model_of_one_shape_is_not_cut(tmp_path: Path) -> None:
    measured = calls_to_measure(small.make_recording(tmp_path).path, small.CONTRACT, 2, 48, 0)
    assert len(measured.calls) == 2
