"""Swaps: the largest recorded value, a wider one where that is too weak, or no influence at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffoundry.capture.reference import Reference
from diffoundry.capture.shapes import feeds_at
from diffoundry.capture.swaps import Ranges, record_swaps, wide_values
from diffoundry.formats.recording import Call, Floor, Swap, spread
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

BATCH = AxisRef("batch")
CONTRACT = Contract(
    "unet",
    inputs=(
        TensorSpec("sample", "float32", (BATCH, 2, AxisRef("height"))),
        TensorSpec("timestep", "float32", (BATCH,)),
    ),
    outputs=(TensorSpec("model_output", "float32", (BATCH, 2, AxisRef("height"))),),
    axes=(Axis("batch", 1, 1, 8), Axis("height", 2, 4, 16)),
)
FLOORS = {
    "fp32": {"model_output": Floor(1e-6, 1e-7, 1e-7, 140.0)},
    "fp16": {"model_output": Floor(1e-3, 1e-4, 1e-4, 70.0)},
}
RANGES = Ranges(vocabulary=50, train_timesteps=1000)


class Weighted(torch.nn.Module):
    """sample + weight × timestep: how much the timestep counts is known."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample + self.weight * timestep[:, None, None]


def make_calls(reference: Reference, timesteps: tuple[float, ...]) -> list[Call]:
    calls = []
    for number, timestep in enumerate(timesteps):
        sample = np.random.default_rng(number).standard_normal((1, 2, 4)).astype(np.float32)
        feeds = {"sample": sample, "timestep": np.full(1, timestep, np.float32)}
        shape = {"batch": 1, "height": 4}
        calls.append(Call(feeds, reference.infer(feeds), shape, f"prompt {number}"))
    return calls


def swap_timestep(weight: float, timesteps: tuple[float, ...] = (9, 8, 5, 8)) -> tuple[Swap, ...]:
    reference = Reference(Weighted(weight), CONTRACT)
    calls = make_calls(reference, timesteps)
    swaps = record_swaps(reference, calls[:1], calls, FLOORS, RANGES)
    return tuple(swap for swap in swaps if swap.input == "timestep")


def test_the_recorded_value_with_the_largest_effect_is_swapped_in() -> None:
    (swap,) = swap_timestep(0.1)
    assert (swap.status, swap.value) == ("real", "recorded: prompt 2")
    assert swap.feeds["timestep"] == 5
    assert swap.effect == pytest.approx(0.4, rel=1e-5)
    assert swap.decides(FLOORS["fp16"]) == ("model_output",)


def test_a_value_that_decides_at_fp32_only_gets_an_enlarged_one_beside_it() -> None:
    real, enlarged = swap_timestep(1e-4)
    assert (real.status, enlarged.status) == ("real", "enlarged")
    assert real.decides(FLOORS["fp32"])
    assert not real.decides(FLOORS["fp16"])
    assert enlarged.value == "timestep 999"
    assert enlarged.decides(FLOORS["fp16"])


def test_a_value_that_decides_nothing_is_replaced_by_an_enlarged_one() -> None:
    (swap,) = swap_timestep(1e-7)
    assert swap.status == "enlarged"
    assert swap.decides(FLOORS["fp32"])


def test_without_another_recorded_value_the_swap_is_enlarged() -> None:
    (swap,) = swap_timestep(0.1, (9, 9))
    assert (swap.status, swap.value) == ("enlarged", "timestep 999")


def test_an_input_without_influence_is_recorded_as_such() -> None:
    (swap,) = swap_timestep(0.0)
    assert (swap.status, swap.effect) == ("no_influence", 0.0)
    assert swap.decides(FLOORS["fp32"]) == ()


def test_an_influence_below_rounding_is_not_called_none() -> None:
    (swap,) = swap_timestep(1e-12)
    assert swap.status == "enlarged"
    assert 0 < swap.effect < 1e-8
    assert swap.decides(FLOORS["fp32"]) == ()


def test_a_dropped_input_shows_in_the_change_of_the_output() -> None:
    (swap,) = swap_timestep(0.1)
    dropped = Reference(Weighted(0.0), CONTRACT)
    (base,) = make_calls(dropped, (9,))
    change = dropped.infer(swap.feeds)["model_output"] - base.outputs["model_output"]
    assert np.abs(change).max() == 0 < 0.3 < swap.effect


def test_wide_values_stay_legal() -> None:
    def values(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
        return dict(wide_values(TensorSpec(name, str(value.dtype), ()), value, RANGES))

    ids = values("input_ids", np.zeros((1, 5), np.int64))
    assert all(one.dtype == np.int64 and set(one.flat) <= set(range(50)) for one in ids.values())
    steps = values("timestep", np.zeros(2, np.float32))
    assert {float(one[1]) for one in steps.values()} == {0.0, 249.0, 499.0, 999.0}
    guidances = values("timestep_cond", np.zeros((3, 2), np.float32))
    assert {one.shape for one in guidances.values()} == {(3, 2)}
    image = values("image", np.full((1, 3, 2, 2), -1, np.float32))
    assert all(np.abs(one).max() <= 1 for one in image.values())
    mask = values("attention_mask", np.ones((1, 4), np.int64))
    assert [one.tolist() for one in mask.values()] == [[[1, 1, 1, 1]], [[1, 1, 0, 0]]]


def test_feeds_at_another_shape_hold_real_values_and_differ_over_the_batch() -> None:
    calls = make_calls(Reference(Weighted(1.0), CONTRACT), (9, 8, 7))
    feeds = feeds_at(CONTRACT, calls, {"batch": 4, "height": 10})
    CONTRACT.check_feeds(feeds)
    np.testing.assert_array_equal(feeds["timestep"], [9, 8, 7, 9])
    row = calls[1].feeds["sample"][0, 0]
    np.testing.assert_array_equal(feeds["sample"][1, 0], [*row, *row[::-1], *row[:2]])
    cropped = feeds_at(CONTRACT, calls, {"batch": 2, "height": 2})
    np.testing.assert_array_equal(cropped["timestep"], [9, 7])
    np.testing.assert_array_equal(cropped["sample"][0], calls[0].feeds["sample"][0, :, :2])


def test_feeds_at_the_usual_shape_are_the_first_call() -> None:
    calls = make_calls(Reference(Weighted(1.0), CONTRACT), (9, 8))
    feeds = feeds_at(CONTRACT, calls, {"batch": 1, "height": 4})
    np.testing.assert_array_equal(feeds["sample"], calls[0].feeds["sample"])


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_spread_takes_first_and_last(count: int, expected: list[int]) -> None:
    assert spread(range(5), count) == expected
