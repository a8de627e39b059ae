"""The reference in fp32, float64 and emulated fp16, and the floors that follow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffoundry.capture.floors import compare, measure_floors, worst_floors
from diffoundry.capture.reference import Reference
from diffoundry.errors import ContractError, ModelError
from diffoundry.formats.recording import Call
from diffoundry.memory import peak_memory, reset_peak_memory
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

WIDTH = 6
CONTRACT = Contract(
    "unet",
    inputs=(
        TensorSpec("sample", "float32", (AxisRef("batch"), 3, WIDTH)),
        TensorSpec("timestep", "float32", (AxisRef("batch"),)),
    ),
    outputs=(TensorSpec("model_output", "float32", (AxisRef("batch"), 3, WIDTH)),),
    axes=(Axis("batch", 1, 1, 4),),
)


class Small(torch.nn.Module):
    """Attention, a norm, a sinusoid kept in fp32 as diffusers does, and an in-place operation."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.scale = scale

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep[:, None] * torch.linspace(0.1, 1, WIDTH, dtype=torch.float32)
        hidden = self.inner(sample) * self.scale
        hidden = hidden / self.scale + angles.sin().to(sample.dtype)[:, None]
        hidden = torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        hidden += sample
        return self.norm(hidden)


def make_feeds(seed: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    sample = draw.standard_normal((batch, 3, WIDTH)).astype(np.float32)
    return {"sample": sample, "timestep": np.full(batch, 961.37, np.float32)}


def run_half(reference: Reference, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return reference.infer_half(feeds)[0]["model_output"]


def test_emulated_fp16_is_as_far_from_fp32_as_real_fp16_and_close_to_it() -> None:
    reference = Reference(Small(), CONTRACT)
    feeds = make_feeds()
    full = reference.infer(feeds)["model_output"]
    emulated = run_half(reference, feeds)
    with torch.no_grad():
        real = Small().half()(
            torch.from_numpy(feeds["sample"]).half(), torch.from_numpy(feeds["timestep"])
        )
    assert 1e-5 < np.abs(emulated - full).max() < 1e-2
    # Only the order of additions inside an operation differs: a unit or two in the last place.
    np.testing.assert_allclose(emulated, real.float().numpy(), atol=4e-3)
    np.testing.assert_array_equal(emulated, emulated.astype(np.float16))


def test_emulated_bfloat16_is_as_far_from_fp32_as_real_bfloat16() -> None:
    reference = Reference(Small(scale=1e5), CONTRACT)
    feeds = make_feeds()
    full = reference.infer(feeds)["model_output"]
    made, overflowed = reference.infer_half(feeds, "bf16")
    emulated = made["model_output"]
    with torch.no_grad():
        real = Small(scale=1e5).bfloat16()(
            torch.from_numpy(feeds["sample"]).bfloat16(), torch.from_numpy(feeds["timestep"])
        )
    assert not overflowed, "bfloat16 has float32's range"
    assert 1e-3 < np.abs(emulated - full).max() < 8e-2
    np.testing.assert_allclose(emulated, real.float().numpy(), atol=5e-2)
    np.testing.assert_array_equal(emulated, torch.from_numpy(emulated).bfloat16().float().numpy())


def test_half_and_double_leave_the_weights_alone_and_hold_no_second_network() -> None:
    class Deep(torch.nn.Module):
        """Sixteen layers of which one alone would show in memory."""

        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(16)]
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(WIDTH, 1024), *layers, torch.nn.Linear(1024, WIDTH)
            )

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.layers(sample) + timestep[:, None, None]

    reference = Reference(Deep(), CONTRACT)
    kept = [tensor.data_ptr() for tensor in reference.module.parameters()]
    feeds = make_feeds()
    before = reference.infer(feeds)["model_output"]
    whole = 16 * 1024 * 1024 * 8  # all layers in float64
    for run in (reference.infer_half, reference.infer_double):
        reset_peak_memory()
        held = peak_memory()
        run(feeds)
        assert peak_memory() - held < whole / 2
    np.testing.assert_array_equal(before, reference.infer(feeds)["model_output"])
    assert kept == [tensor.data_ptr() for tensor in reference.module.parameters()]


def test_float64_reaches_what_the_model_itself_keeps_in_float32() -> None:
    reference = Reference(Small(), CONTRACT)
    feeds = make_feeds()
    exact = reference.infer_double(feeds)["model_output"]
    assert exact.dtype == np.float64
    sample = torch.from_numpy(feeds["sample"]).double()
    module = Small().double()
    timestep = torch.from_numpy(feeds["timestep"]).double()
    angles = timestep[:, None] * torch.linspace(0.1, 1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        hidden = module.inner(sample) + angles.sin()[:, None]
        hidden = torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        np.testing.assert_allclose(exact, module.norm(hidden + sample).numpy(), atol=1e-13)


def test_floors_are_those_of_the_worst_call() -> None:
    reference = Reference(Small(), CONTRACT)
    calls = []
    for seed in range(3):
        feeds = make_feeds(seed)
        calls.append(Call(feeds, reference.infer(feeds), {"batch": 1}, ""))
    alone = measure_floors(reference, calls, lambda line: None)
    together = worst_floors(alone)
    assert list(measure_floors(reference, calls[:1], lambda line: None, ["fp32"])[0]) == ["fp32"]
    for precision in ("fp32", "fp16"):
        figures = [one[precision]["model_output"] for one in alone]
        assert together[precision]["model_output"].max_abs == max(f.max_abs for f in figures)
        assert together[precision]["model_output"].sqnr_db == min(f.sqnr_db for f in figures)


def test_what_overflows_fp16_counts_as_kept_in_fp32_and_is_said() -> None:
    reference = Reference(Small(scale=1e6), CONTRACT)
    feeds = make_feeds()
    said: list[str] = []
    calls = [Call(feeds, reference.infer(feeds), {"batch": 1}, "")]
    floor = worst_floors(measure_floors(reference, calls, said.append))["fp16"]["model_output"]
    assert 0 < floor.max_abs < 1e-2
    assert said == ["unet: fp16 overflows; parts of it must stay fp32"]


def test_figures_of_a_comparison() -> None:
    floor = compare(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
    assert (floor.max_abs, floor.mean_abs) == (0.5, 0.25)
    assert floor.rms == pytest.approx(np.sqrt(0.125))
    assert floor.sqnr_db == pytest.approx(10 * np.log10(2.5 / 0.125))
    assert compare(np.ones(2), np.ones(2)).sqnr_db == 300


class Sick(Small):
    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.middle = torch.nn.Identity()
        self.middle.register_forward_hook(lambda module, given, value: spoil(value))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(self.middle(sample), timestep)


def test_a_sick_reference_names_component_and_first_bad_module() -> None:
    reference = Reference(Sick(lambda value: value / 0), CONTRACT)
    with pytest.raises(ModelError) as caught:
        reference.infer(make_feeds())
    assert "unet" in caught.value.where
    assert "first in middle" in caught.value.found


def test_a_sick_weight_is_named() -> None:
    module = Small()
    module.inner.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"first in inner \(.*inner\.weight"):
        Reference(module, CONTRACT).infer(make_feeds())


def test_feeds_are_held_against_the_contract() -> None:
    with pytest.raises(ContractError, match="timestep"):
        Reference(Small(), CONTRACT).infer({"sample": make_feeds()["sample"]})
