"""Phase 2: the text encoder, then the teacher, an ordinary latent diffusion U-Net."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.embedded.networks import NOISE_SCHEDULE, TOKENS, build_text_encoder, build_unet
from diffoundry.embedded.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, all_scenes, caption
from diffoundry.embedded.training import Phase, Settings

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


def tokenize_all(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Token ids of every scene's caption, then of the empty prompt: int64 [scenes + 1, 16]."""
    prompts = [*map(caption, all_scenes()), ""]
    batch = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return batch.input_ids


def encode_prompts(text_encoder: CLIPTextModel, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of the tokens: int64 [n, 16] -> float32 [n, 16, 96]."""
    import torch

    with torch.no_grad():
        return text_encoder(tokens.to(text_encoder.device)).last_hidden_state


def signal_levels(device: str) -> torch.Tensor:
    """Cumulative product of alphas, float32 [1000], as every scheduler here computes it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**NOISE_SCHEDULE).alphas_cumprod.to(device)


def prepare_for_training(unet: UNet2DConditionModel) -> None:
    """Plain attention, and an output layer that stays in float32 under autocast.

    On a CPU the fused attention kernel's bfloat16 backward pass takes half of a step. A rounded
    output would be 15 times as wrong in the clean latent that the noisiest timestep points to.
    """
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    class Float32Conv2d(torch.nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input.float())

    unet.set_attn_processor(AttnProcessor())
    old = unet.conv_out
    exact = Float32Conv2d(old.in_channels, old.out_channels, 3, padding=1, device=old.weight.device)
    exact.load_state_dict(old.state_dict())
    unet.conv_out = exact


def train_text_encoder(
    work: Path, settings: Settings, device: str, tokenizer: CLIPTokenizer
) -> CLIPTextModel:
    """Trains the text encoder: after the last word, every position tells the whole scene.

    It learns this by naming colour, shape, size and background from the hidden states, in a
    minute; trained only through the U-Net, prompts are followed long after shapes are clean.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional

    torch.manual_seed(settings.seed + 1)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text_encoder = build_text_encoder(len(tokenizer), bos, eos).to(device)
    path = work / "text_encoder.safetensors"
    if path.exists():
        text_encoder.load_state_dict(load_file(path))
        return text_encoder.eval().requires_grad_(False)
    tokens = tokenize_all(tokenizer).to(device)
    choices = (COLOURS, SHAPES, SIZES, BACKGROUNDS)
    labels = torch.tensor(
        [
            [c.index(word) for c, word in zip(choices, words, strict=True)]
            for words in ((s.colour, s.shape, s.size, s.background) for s in all_scenes())
        ]
    ).to(device)
    width = text_encoder.config.hidden_size
    head = torch.nn.Linear(width, sum(map(len, choices))).to(device)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *head.parameters()], lr=1e-3)
    last = TOKENS // 2
    for step in range(settings.text_steps):
        rng = np.random.default_rng([settings.seed, 3, step])
        index = torch.from_numpy(rng.integers(0, len(labels), size=64)).to(device)
        states = text_encoder(tokens[index]).last_hidden_state[:, -last:]
        scores = head(states).split([len(c) for c in choices], dim=-1)
        losses = [
            functional.cross_entropy(s.flatten(0, 1), labels[index, i].repeat_interleave(last))
            for i, s in enumerate(scores)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"text: step {step + 1}, loss {loss.item():.4f}", flush=True)
    save_file(text_encoder.state_dict(), path)
    return text_encoder.eval().requires_grad_(False)


def train_teacher(
    work: Path,
    settings: Settings,
    device: str,
    states: torch.Tensor,
    latents: tuple[torch.Tensor, torch.Tensor],
) -> tuple[UNet2DConditionModel, list[Phase]]:
    """Trains a U-Net to predict noise; returns it with averaged weights.

    In a second part all timesteps are equally likely: what follows the prompt is there, and the
    edges, which little noise decides, are sharpened.

    `states` are the text encoder's for every caption and, last, the empty prompt:
    [scenes + 1, 16, 96]; `latents` are the cached moments [n, 2, 4, 16, 16] and scene indices [n].
    """
    import torch

    unet = build_unet(guidance_embedding=False).to(device)
    prepare_for_training(unet)
    average = copy.deepcopy(unet).requires_grad_(False)
    alphas = signal_levels(device)
    odds = timestep_odds(alphas)
    uniform = torch.full_like(odds, 1 / len(odds))
    parts = [
        ("teacher", settings.teacher_steps, settings.teacher_rate, odds),
        ("teacher_more", settings.teacher_more_steps, settings.teacher_more_rate, uniform),
    ]
    phases = []
    for number, (name, steps, rate, part_odds) in enumerate(parts):
        torch.manual_seed(settings.seed + 2 + 10 * number)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
        )
        phase = Phase(name, work, steps, {"unet": unet}, optimizer, schedule, {"unet": average})
        phase.resume()
        while phase.step < phase.steps:
            rng = np.random.default_rng([settings.seed, 4 + 10 * number, phase.step])
            loss = _teacher_loss(unet, settings, alphas, part_odds, states, latents, rng)
            phase.take_step(loss, settings.sampling_decay)
        phases.append(phase)
    return average, phases


def _teacher_loss(
    unet: UNet2DConditionModel,
    settings: Settings,
    alphas: torch.Tensor,
    odds: torch.Tensor,
    states: torch.Tensor,
    latents: tuple[torch.Tensor, torch.Tensor],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Mean square of the error in the predicted noise, over one batch."""
    import torch

    moments, scene_index = latents
    device, batch = alphas.device, settings.teacher_batch
    picked = torch.from_numpy(rng.integers(0, len(moments), size=batch))
    captions = scene_index[picked].to(device)
    dropped = rng.random(batch) < settings.teacher_empty_prompts
    captions[torch.from_numpy(dropped).to(device)] = len(states) - 1
    mean, std = moments[picked.to(device)].unbind(1)
    clean = mean + std * torch.randn(mean.shape).to(device)
    noise = torch.randn(mean.shape).to(device)
    t = torch.multinomial(odds.cpu(), batch, replacement=True).to(device)
    level = alphas[t].view(-1, 1, 1, 1)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.low_precision):
        predicted = unet(noisy, t, states[captions]).sample
    return (predicted.float() - noise).square().mean()


def timestep_odds(alphas: torch.Tensor) -> torch.Tensor:
    """How often each of the 1000 timesteps is trained: float32 [1000], sum 1.

    Half uniform, half in proportion to 1 / signal: what a picture shows is decided where the
    noise is strong, and there an error in the noise is an error 1 / signal as large in the latent.
    """
    noisy = alphas.rsqrt()
    return 0.5 / len(alphas) + 0.5 * noisy / noisy.sum()
