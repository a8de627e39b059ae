"""What the training phases share: settings, seeds, averaged weights, checkpoints, the log."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from diffoundry.embedded.scenes import Scene


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights; the defaults made the shipped ones."""

    seed: int = 20261120
    vae_steps: int = 1200
    vae_batch: int = 24
    vae_rate: float = 2e-3
    vae_edge_steps: int = 1200
    vae_edge_rate: float = 1e-3
    vae_edge_weight: float = 6.0
    vae_kl: float = 1e-4
    cached_scenes: int = 10_080
    text_steps: int = 500
    teacher_steps: int = 2400
    teacher_batch: int = 32
    teacher_rate: float = 1e-3
    teacher_more_steps: int = 1900
    teacher_more_rate: float = 7e-4
    teacher_empty_prompts: float = 0.1
    teacher_guidance: float = 3.0
    lcm_steps: int = 1200
    lcm_rate: float = 3e-4
    lcm_more_steps: int = 800
    lcm_more_rate: float = 1e-4
    lcm_batch: int = 32
    lcm_grid: int = 50
    lcm_guidance_min: float = 1.0
    lcm_guidance_max: float = 7.0
    lcm_target_decay: float = 0.95
    ends_steps: int = 1500
    ends_rate: float = 2e-4
    ends_pool: int = 16
    ends_refresh: int = 40
    ends_decay: float = 0.998
    sampling_decay: float = 0.995
    low_precision: bool = True
    """bfloat16 autocast: 1.5 times faster on a CPU with AMX; the weights stay float32."""


@dataclass
class Phase:
    """One resumable training phase: `modules` are trained, `averages` follow them."""

    name: str
    folder: Path
    steps: int
    modules: dict[str, torch.nn.Module]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    averages: dict[str, torch.nn.Module] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    records: list[dict[str, float]] = field(default_factory=list)
    _mark: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def resume(self) -> None:
        """Continues from the phase's checkpoint, if there is one."""
        import torch

        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        for key, module in self.averages.items():
            module.load_state_dict(state["averages"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.seconds, self.records = state["step"], state["seconds"], state["records"]
        torch.set_rng_state(state["rng"])
        print(f"{self.name}: resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Writes the checkpoint; a kill in the middle leaves the former one."""
        import torch

        now = time.monotonic()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "averages": {key: module.state_dict() for key, module in self.averages.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "rng": torch.get_rng_state(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def take_step(self, loss: torch.Tensor, decay: float = 0.0) -> None:
        """Backward, clipped update, averages; logs every 50 steps, saves every 200."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        for key, average in self.averages.items():
            follow(average, self.modules[key], min(decay, self.step / (self.step + 10)))
        if self.step % 50 == 0 or self.step == self.steps:
            self.log(loss=loss.item())
        if self.step % 200 == 0 or self.step == self.steps:
            self.save()

    def log(self, **figures: float) -> None:
        """Adds figures of the current step to the record and prints them."""
        elapsed = self.seconds + time.monotonic() - self._mark
        record = {"step": self.step, "seconds": round(elapsed, 1)}
        record |= {key: round(value, 5) for key, value in figures.items()}
        self.records.append(record)
        print(f"{self.name}: {json.dumps(record)}", flush=True)


def follow(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the module's: average = decay*average + (1-decay)*new."""
    import torch

    ours, theirs = list(average.parameters()), [p.detach() for p in module.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(ours, theirs, 1 - decay)


def draw_batch(scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """The scenes drawn: float32 [batch, 3, 64, 64] in -1..1."""
    import torch

    from diffoundry.embedded.scenes import draw

    pictures = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def pick_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """`count` scenes, drawn uniformly from all of them."""
    from diffoundry.embedded.scenes import all_scenes

    scenes = all_scenes()
    return [scenes[i] for i in rng.integers(0, len(scenes), size=count)]


def read_json(path: Path) -> Any:
    """The parsed JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
