"""Phase 3b: shows the student where the teacher's trajectories really end.

Distillation between neighbouring points hands every small error on from low noise to high; here
the target is the end itself, found by running the teacher (Luhman & Luhman 2021, "Knowledge
Distillation in Iterative Generative Models"), from pure noise and from the student's own first
answers made noisy again, which is what its later steps meet.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.embedded.scenes import Scene, all_scenes
from diffoundry.embedded.train_lcm import HUBER, Distillation, embed_guidance
from diffoundry.embedded.train_teacher import prepare_for_training
from diffoundry.embedded.training import Phase, Settings

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

STRIDE = 3
"""The teacher's trajectories take every third point of the grid: 17 steps from pure noise."""


def train_ends(
    work: Path,
    settings: Settings,
    distillation: Distillation,
    student: UNet2DConditionModel,
) -> tuple[UNet2DConditionModel, Phase]:
    """Trains a copy of `student` on ends of the teacher's trajectories; returns its average."""
    import torch

    unet = copy.deepcopy(student).train().requires_grad_(True)
    prepare_for_training(unet)
    average = copy.deepcopy(unet).requires_grad_(False)
    torch.manual_seed(settings.seed + 7)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.ends_rate, weight_decay=1e-4,
                                  fused=True)  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.ends_rate, total_steps=settings.ends_steps, pct_start=0.05
    )
    phase = Phase(
        "ends", work, settings.ends_steps, {"unet": unet}, optimizer, schedule, {"unet": average}
    )
    phase.resume()
    pool = Pool(distillation)
    while phase.step < phase.steps:
        # A resumed run fills its pool anew: the pool is no part of the checkpoint.
        if len(pool.kept) < settings.ends_pool or phase.step % settings.ends_refresh == 0:
            rng = np.random.default_rng([settings.seed, 17, phase.step, len(pool.kept)])
            pool.add(average, rng)
            if len(pool.kept) < settings.ends_pool:
                continue
        rng = np.random.default_rng([settings.seed, 18, phase.step])
        phase.take_step(pool.loss(unet, rng), settings.ends_decay)
    return average, phase


@dataclass
class Trajectories:
    """A batch of the teacher's trajectories.

    `latents` [points, batch, 4, 16, 16], `places` (indices into the grid) [points, batch],
    `text` [batch, 16, 96], `condition` [batch, 64], `end` [batch, 4, 16, 16]. A trajectory that
    started late repeats its start.
    """

    latents: torch.Tensor
    places: torch.Tensor
    text: torch.Tensor
    condition: torch.Tensor
    end: torch.Tensor


@dataclass
class Pool:
    """The newest trajectories, from which steps draw their batches."""

    distillation: Distillation
    kept: deque[Trajectories] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.kept = deque(maxlen=self.distillation.settings.ends_pool)
        weights = np.array([_weight(scene) for scene in all_scenes()])
        self._odds = weights / weights.sum()

    def add(self, student: UNet2DConditionModel, rng: np.random.Generator) -> None:
        """Runs the teacher on a fresh batch of prompts and starts."""
        import torch

        own, settings = self.distillation, self.distillation.settings
        batch, last = settings.lcm_batch, len(own.grid) - 1
        scenes = torch.from_numpy(rng.choice(len(self._odds), size=batch, p=self._odds))
        text = own.states[scenes.to(own.device)]
        guidance = torch.from_numpy(
            rng.uniform(settings.lcm_guidance_min, settings.lcm_guidance_max, size=batch)
        ).float().to(own.device)  # fmt: skip
        condition = embed_guidance(guidance - 1)
        sample = torch.randn(batch, 4, 16, 16).to(own.device)
        place = torch.full((batch,), last, device=own.device)
        with torch.no_grad():
            # Half start from noise; the others where the student's later steps start.
            late = torch.from_numpy(rng.integers(5, last, size=batch)).to(own.device)
            late[: batch // 2] = last
            answer = own.consistency(student, sample, place, text, condition)
            level = own.alphas[late]
            again = level.sqrt() * answer + (1 - level).sqrt() * torch.randn_like(answer)
            chosen = (late < last).view(-1, 1, 1, 1)
            sample, place = torch.where(chosen, again, sample), late
            latents, places = [], []
            while bool((place > 0).any()):
                latents.append(sample)
                places.append(place)
                before = (place - STRIDE).clamp(min=0)
                moved = own.step_teacher(sample, place, before, text, guidance)
                sample = torch.where((place > 0).view(-1, 1, 1, 1), moved, sample)
                place = before
        # Points at place 0 are ends already: they are drawn as their trajectory's start instead.
        stacked, where = torch.stack(latents), torch.stack(places)
        done = (where == 0).view(*where.shape, 1, 1, 1)
        self.kept.append(
            Trajectories(
                torch.where(done, stacked[:1], stacked),
                torch.where(where == 0, where[:1], where),
                text,
                condition,
                sample,
            )
        )

    def loss(self, unet: UNet2DConditionModel, rng: np.random.Generator) -> torch.Tensor:
        """How far the student's answers at points of the trajectories are from their ends."""
        import torch

        own = self.distillation
        batch = own.settings.lcm_batch
        rows = []
        for _ in range(batch):
            one = self.kept[int(rng.integers(len(self.kept)))]
            column = int(rng.integers(one.end.shape[0]))
            # A quarter are starts: the first step of a picture decides what is in it.
            point = 0 if rng.random() < 0.25 else int(rng.integers(one.places.shape[0]))
            rows.append(
                (
                    one.latents[point, column],
                    one.places[point, column],
                    one.text[column],
                    one.condition[column],
                    one.end[column],
                )
            )
        sample, place, text, condition, end = (
            torch.stack(part) for part in zip(*rows, strict=True)
        )
        got = own.consistency(unet, sample, place, text, condition)
        return (((got - end).square() + HUBER**2).sqrt() - HUBER).mean()


def _weight(scene: Scene) -> float:
    """How often a scene is drawn; nearly all unreadable pictures are those with fine parts."""
    return 2.0 if scene.shape in ("star", "ring") or scene.size == "small" else 1.0
