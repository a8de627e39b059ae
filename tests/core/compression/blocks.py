"""A network of one feed-forward block whose best cut is known, with calls recorded from it."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.models.attention import FeedForward

from diffoundry.formats.recording import Call
from diffoundry.types import Axis, AxisRef, Contract, TensorSpec

WIDTH, INNER = 6, 8
EDGE = (AxisRef("batch"), 4, WIDTH)
CONTRACT = Contract(
    "unet",
    (TensorSpec("sample", "float32", EDGE), TensorSpec("timestep", "float32", (AxisRef("batch"),))),
    (TensorSpec("model_output", "float32", EDGE),),
    (Axis("batch", 1, 1, 4),),
)


class Network(torch.nn.Module):
    """x + FeedForward(x); the timestep only scales."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward(WIDTH, mult=1, inner_dim=INNER, activation_fn="gelu")

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * (1 + timestep[:, None, None] / 1000) + self.ff(sample)


def make_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().eval().requires_grad_(False)


def record(network: Network, count: int, seed: int = 1) -> list[Call]:
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for number in range(count):
        sample = torch.randn(1, 4, WIDTH, generator=generator)
        timestep = torch.tensor([999.0 - 200 * (number % 4)])
        output = network(sample, timestep)
        calls.append(
            Call(
                {"sample": sample.numpy(), "timestep": timestep.numpy()},
                {"model_output": output.numpy().astype(np.float32)},
                {"batch": 1},
                "",
            )
        )
    return calls
