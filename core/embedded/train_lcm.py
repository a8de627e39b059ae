"""Phase 3: latent consistency distillation of the teacher into a student that needs few steps.

Luo et al. 2023, "Latent Consistency Models", algorithm 1, with the noise schedule, the boundary
scalings and the guidance embedding that diffusers' LCMScheduler and pipeline use.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.embedded.networks import GUIDANCE_WIDTH, build_unet
from diffoundry.embedded.train_teacher import prepare_for_training, signal_levels
from diffoundry.embedded.training import Phase, Settings, follow

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

HUBER = 1e-3


def embed_guidance(w: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the guidance, w = guidance_scale - 1: float32 [batch] -> [batch, 64]."""
    import torch

    half = GUIDANCE_WIDTH // 2
    ladder = torch.arange(half, dtype=torch.float32, device=w.device) / (half - 1)
    angles = 1000 * w[:, None] * torch.exp(-np.log(10_000.0) * ladder)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def boundary_scalings(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out of timesteps [batch], as LCMScheduler has them: two [batch, 1, 1, 1]."""
    scaled = t.float().view(-1, 1, 1, 1) * 10
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def train_lcm(
    work: Path, settings: Settings, distillation: Distillation
) -> tuple[UNet2DConditionModel, list[Phase]]:
    """Distils the teacher, then once more with short jumps only; returns the averaged student."""
    import torch

    unet = start_student(distillation.teacher).to(distillation.device)
    target = copy.deepcopy(unet).requires_grad_(False)
    average = copy.deepcopy(unet).requires_grad_(False)
    parts = [
        ("lcm", settings.lcm_steps, settings.lcm_rate),
        ("lcm_more", settings.lcm_more_steps, settings.lcm_more_rate),
    ]
    phases = []
    for number, (name, steps, rate) in enumerate(parts):
        torch.manual_seed(settings.seed + 3 + number)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rate, total_steps=steps, pct_start=0.05
        )
        modules: dict[str, torch.nn.Module] = {"unet": unet, "target": target}
        phase = Phase(name, work, steps, modules, optimizer, schedule, {"unet": average})
        phase.resume()
        while phase.step < phase.steps:
            rng = np.random.default_rng([settings.seed, 5 + 3 * number, phase.step])
            jump = jump_length(phase.step / phase.steps) if number == 0 else 1
            phase.take_step(distillation.loss(unet, target, jump, rng), settings.sampling_decay)
            follow(target, unet, settings.lcm_target_decay)
        phases.append(phase)
    return average, phases


@dataclass
class Distillation:
    """What one step of the distillation needs beside the student.

    `states` are the text encoder's for every caption and, last, the empty prompt:
    [scenes + 1, 16, 96]; `moments` [n, 2, 4, 16, 16] and `scene_index` [n] are the cached latents.
    """

    settings: Settings
    device: str
    teacher: UNet2DConditionModel
    states: torch.Tensor
    moments: torch.Tensor
    scene_index: torch.Tensor

    def __post_init__(self) -> None:
        import torch

        # Timestep 0 stands before the grid of 50: the end that every trajectory shares.
        stride = 1000 // self.settings.lcm_grid
        self.grid = torch.tensor([0, *range(stride - 1, 1000, stride)], device=self.device)
        self.alphas = signal_levels(self.device)[self.grid].view(-1, 1, 1, 1)

    def loss(
        self,
        unet: UNet2DConditionModel,
        target: UNet2DConditionModel,
        jump: int,
        rng: np.random.Generator,
    ) -> torch.Tensor:
        """How far the student's answer is from the target's, `jump` grid points earlier."""
        import torch

        settings, device, batch = self.settings, self.device, self.settings.lcm_batch
        picked = torch.from_numpy(rng.integers(0, len(self.moments), size=batch))
        text = self.states[self.scene_index[picked].to(device)]
        mean, std = self.moments[picked.to(device)].unbind(1)
        clean = mean + std * torch.randn(mean.shape).to(device)
        noise = torch.randn(mean.shape).to(device)
        place = torch.from_numpy(rng.integers(1, len(self.grid), size=batch)).to(device)
        before = (place - jump).clamp(min=0)
        low, high = settings.lcm_guidance_min, settings.lcm_guidance_max
        guidance = torch.from_numpy(rng.uniform(low, high, size=batch)).float().to(device)
        condition = embed_guidance(guidance - 1)
        level = self.alphas[place]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        with torch.no_grad():
            earlier = self.step_teacher(noisy, place, before, text, guidance)
            wanted = self.consistency(target, earlier, before, text, condition)
        got = self.consistency(unet, noisy, place, text, condition)
        return (((got - wanted).square() + HUBER**2).sqrt() - HUBER).mean()

    def step_teacher(
        self,
        noisy: torch.Tensor,
        place: torch.Tensor,
        before: torch.Tensor,
        text: torch.Tensor,
        guidance: torch.Tensor,
    ) -> torch.Tensor:
        """One guided DDIM step from grid point `place` to `before`: latent -> latent."""
        import torch

        empty = self.states[-1:].expand_as(text)
        both = self.predict(
            self.teacher,
            noisy.repeat(2, 1, 1, 1),
            self.grid[place].repeat(2),
            torch.cat([text, empty]),
        )
        with_text, without = both.chunk(2)
        guided = without + guidance.view(-1, 1, 1, 1) * (with_text - without)
        clean = clean_from(noisy, guided, self.alphas[place])
        level = self.alphas[before]
        return level.sqrt() * clean + (1 - level).sqrt() * guided

    def consistency(
        self,
        net: UNet2DConditionModel,
        sample: torch.Tensor,
        place: torch.Tensor,
        text: torch.Tensor,
        condition: torch.Tensor,
    ) -> torch.Tensor:
        """The consistency function: the clean latent that `net` sees in `sample`."""
        skip, out = boundary_scalings(self.grid[place])
        noise = self.predict(net, sample, self.grid[place], text, condition)
        return skip * sample + out * clean_from(sample, noise, self.alphas[place])

    def predict(
        self,
        net: UNet2DConditionModel,
        sample: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise that `net` predicts, float32 [batch, 4, 16, 16]."""
        import torch

        low = self.settings.low_precision
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=low):
            noise = net(sample, t, text, timestep_cond=condition).sample
        return noise.float()


def start_student(teacher_unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with a guidance embedding, whose first contribution is nothing."""
    import torch

    unet = build_unet(guidance_embedding=True)
    weights = dict(teacher_unet.state_dict())
    weights["time_embedding.cond_proj.weight"] = torch.zeros_like(
        unet.time_embedding.cond_proj.weight
    )
    unet.load_state_dict(weights)
    prepare_for_training(unet)
    return unet


def jump_length(progress: float) -> int:
    """How many grid points lie between the two ends of a step, at a progress of 0..1.

    Long jumps carry what is known at low noise to high noise sooner; short ones follow the
    teacher's trajectory more truly.
    """
    return 5 if progress < 0.25 else 2 if progress < 0.6 else 1


def clean_from(sample: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The clean latent that a noisy one and its noise imply: (x - sqrt(1-a) e) / sqrt(a)."""
    return (sample - (1 - level).sqrt() * noise) / level.sqrt()
