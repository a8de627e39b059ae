"""A short distillation from the original: what a few steps on recorded calls give back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffoundry.compression.statistics import feeds_of

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract


def recover(
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    steps: int,
    rate: float = 1e-4,
    batch: int = 8,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Train `module` in place towards the outputs that the original gave in `calls`.

    AdamW with a rate that falls to zero along a cosine; each step takes `batch` calls of one
    shape. The loss is the mean square error over the outputs' mean square. Returns the mean loss
    of the last tenth of the steps.
    """
    import numpy as np
    import torch

    module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    stacks = _by_shape(contract, calls)
    losses = []
    for step in range(steps):
        inputs, wanted = stacks[int(rng.integers(len(stacks)))]
        picked = torch.from_numpy(rng.integers(0, len(inputs[0]), size=batch))
        made = module(*(one[picked] for one in inputs))
        outputs = made if isinstance(made, tuple) else (made,)
        loss = torch.stack(
            [
                (got - goal[picked]).square().mean() / goal[picked].square().mean()
                for got, goal in zip(outputs, wanted, strict=True)
            ]
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            say(f"recovery: step {step + 1} of {steps}, loss {np.mean(losses[-100:]):.2e}")
    module.requires_grad_(False)
    return float(np.mean(losses[-max(1, steps // 10) :]))


def _by_shape(
    contract: Contract, calls: Sequence[Call]
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Inputs and outputs of the calls of each shape, joined along the batch."""
    import numpy as np
    import torch

    groups: dict[tuple[tuple[str, int], ...], list[Call]] = {}
    for call in calls:
        shape = {axis: size for axis, size in call.shape.items() if axis != "batch"}
        groups.setdefault(tuple(sorted(shape.items())), []).append(call)
    stacks = []
    for group in groups.values():
        rows = [feeds_of(contract, call.feeds) for call in group]
        inputs = [torch.cat(column) for column in zip(*rows, strict=True)]
        outputs = [
            torch.cat([torch.from_numpy(np.ascontiguousarray(c.outputs[spec.name])) for c in group])
            for spec in contract.outputs
        ]
        stacks.append((inputs, outputs))
    return stacks
