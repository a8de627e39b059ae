"""A short distillation from the original: what a few steps on recorded calls give back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffoundry.compression.statistics import feeds_of, same_shape

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

    def run(*inputs: torch.Tensor) -> list[Any]:
        return [module(*inputs)]

    return train(module, run, contract, calls, steps, rate, batch, seed, say)


def recover_if_better(
    module: torch.nn.Module,
    contract: Contract,
    calls: Sequence[Call],
    held_out: Sequence[Call],
    steps: int,
    rate: float,
    say: Callable[[str], None] = lambda line: None,
) -> Recovery:
    """Recover on `calls`, and go back where the `held_out` calls show that it did not help.

    A network that was fitted well has little to win, and a few steps at too high a rate lose it.
    """
    from diffoundry.compression.replaying import damage_of

    start = {name: value.clone() for name, value in module.state_dict().items()}
    before = damage_of(module, contract, held_out)
    loss = recover(module, contract, calls, steps, rate, say=say)
    after = damage_of(module, contract, held_out)
    if not after < before:
        module.load_state_dict(start)
        say(f"recovery: {after:.2e} on the tuning calls, no better than {before:.2e}: not kept")
    return Recovery(loss, before, after, after < before)


@dataclass(frozen=True)
class Recovery:
    """The last loss, and the relative square error on held-out calls before and after."""

    loss: float
    before: float
    after: float
    kept: bool


def train(
    module: torch.nn.Module,
    run: Callable[..., list[Any]],
    contract: Contract,
    calls: Sequence[Call],
    steps: int,
    rate: float,
    batch: int = 8,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """As `recover`, where `run` gives the outputs of each network that `module`'s weights make."""
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
        loss = torch.stack(
            [
                (got - goal[picked]).square().mean() / goal[picked].square().mean()
                for made in run(*(one[picked] for one in inputs))
                for got, goal in zip(
                    made if isinstance(made, tuple) else (made,), wanted, strict=True
                )
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

    stacks = []
    for numbers in same_shape(calls):
        group = [calls[number] for number in numbers]
        rows = [feeds_of(contract, call.feeds) for call in group]
        inputs = [torch.cat(column) for column in zip(*rows, strict=True)]
        outputs = [
            torch.cat([torch.from_numpy(np.ascontiguousarray(c.outputs[spec.name])) for c in group])
            for spec in contract.outputs
        ]
        stacks.append((inputs, outputs))
    return stacks
