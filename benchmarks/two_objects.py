"""Can two objects in a relation be learnt within the 12 MB of `shapes-lcm`?

    .venv/bin/python benchmarks/two_objects.py --work DIR [--steps 6000]

Scenes such as "a red circle above a blue square on a white background": the shipped autoencoder,
a fresh text encoder of the shipped size, and a U-Net of the shipped size that starts from the
shipped teacher and is trained on two objects (70 %) and one (30 %). Prints how many pictures are
read right, DDIM with 25 steps, guidance 3: all words, and where it goes wrong. Resumable.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from skimage.measure import label
from torch.nn import functional

from diffoundry.embedded import SHAPES_LCM
from diffoundry.embedded.measure import pixels_from
from diffoundry.embedded.networks import NOISE_SCHEDULE, TOKENS, build_text_encoder
from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    SHAPES,
    SIDE,
    all_scenes,
    caption,
    draw,
    shape_coverage,
)
from diffoundry.embedded.train_teacher import prepare_for_training, signal_levels, timestep_odds
from diffoundry.embedded.training import Phase

RELATIONS = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}
TEACHER = Path(__file__).parent.parent / "tests" / "data" / "shapes-teacher" / "unet"
RADIUS, APART, BATCH = 11.0, 14.5, 32
EMPTY = ""


@dataclass(frozen=True)
class Pair:
    """Two small objects, the first in `relation` to the second, on one background."""

    first: tuple[str, str]
    relation: str
    second: tuple[str, str]
    background: str

    def caption(self) -> str:
        (colour, shape), (other, form) = self.first, self.second
        return (
            f"a {colour} {shape} {self.relation} a {other} {form} on a {self.background} background"
        )


def random_pair(rng: np.random.Generator) -> Pair:
    background, one, two = rng.choice(len(COLOURS), 3, replace=False)
    shapes = rng.integers(len(SHAPES), size=2)
    relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
    return Pair(
        (COLOURS[one], SHAPES[shapes[0]]), relation, (COLOURS[two], SHAPES[shapes[1]]),
        BACKGROUNDS[background],
    )  # fmt: skip


def draw_pair(pair: Pair, rng: np.random.Generator) -> np.ndarray:
    """uint8 [64, 64, 3]; both objects wholly inside, never touching."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = PALETTE[pair.background]
    across, down = RELATIONS[pair.relation]
    for (colour, shape), sign in ((pair.first, 1), (pair.second, -1)):
        x, y = (SIDE / 2 + sign * APART * d + rng.uniform(-2, 2) for d in (across, down))
        cover = shape_coverage(shape, x, y, RADIUS * (1 + rng.uniform(-0.03, 0.03)))[..., None]
        picture += cover * (np.array(PALETTE[colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def read_pair(image: np.ndarray) -> tuple[set[tuple[str, str]], str, str] | None:
    """Objects, relation of the alphabetically first to the other, background; None: unreadable."""
    pixels = image.astype(np.float32) * (255 if image.dtype != np.uint8 else 1)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    back = np.median(frame, axis=0)
    parts = label(np.linalg.norm(pixels - back, axis=-1) > 60)
    sizes = np.bincount(parts.ravel())[1:]
    if (sizes > 40).sum() != 2:
        return None
    found = []
    for number in np.flatnonzero(sizes > 40) + 1:
        alone = pixels.copy()
        others = (parts != number) & (parts != 0)
        grown = functional.max_pool2d(torch.from_numpy(others[None].astype(np.float32)), 5, 1, 2)
        alone[grown[0].numpy() > 0] = back
        scene = recognise(alone.clip(0, 255).astype(np.uint8))
        if scene is None or scene.size != "small":
            return None
        rows, columns = np.nonzero(parts == number)
        found.append(((scene.colour, scene.shape), columns.mean(), rows.mean(), scene.background))
    found.sort(key=lambda one: one[0])
    (one, x, y, background), (two, u, v, _) = found
    dx, dy = x - u, y - v
    relation = (
        ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
    )
    return {one, two}, relation, background


def wanted(pair: Pair) -> tuple[set[tuple[str, str]], str, str]:
    relation = pair.relation
    if pair.second < pair.first:
        relation = {"above": "below", "below": "above", "left": "right", "right": "left"}[relation]
    return {pair.first, pair.second}, relation, pair.background


class Words:
    """A token a word: the trial needs no tokenizer files."""

    def __init__(self) -> None:
        words = ["a", "on", "background", "small", "large", *COLOURS, *SHAPES, *RELATIONS]
        self.index = {word: i + 2 for i, word in enumerate(words)}

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Begin, words, end and padding: int64 [n, 16]."""
        rows = [[0, *(self.index[w] for w in p.split()), 1] for p in prompts]
        return torch.tensor([row + [1] * (TOKENS - len(row)) for row in rows])


def answers(pair: Pair) -> list[int]:
    """What the text encoder learns to name: both objects, relation, background, size."""
    (colour, shape), (other, form) = pair.first, pair.second
    return [
        COLOURS.index(colour),
        SHAPES.index(shape),
        list(RELATIONS).index(pair.relation),
        COLOURS.index(other),
        SHAPES.index(form),
        BACKGROUNDS.index(pair.background),
        2,
    ]


def train_text(words: Words, work: Path, rng: np.random.Generator) -> torch.nn.Module:
    """Names both objects, relation and background from each of the last states."""
    torch.manual_seed(3)
    net = build_text_encoder(len(words.index) + 2, 0, 1)
    path = work / "text.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval().requires_grad_(False)
    sizes = (9, 7, 5, 9, 7, 8, 3)  # colour, shape, relation, colour, shape, background, size
    head = torch.nn.Linear(net.config.hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=1e-3)
    for step in range(2500):
        prompts, labels = [], []
        for _ in range(64):
            if rng.random() < 0.7:
                pair = random_pair(rng)
                prompts.append(pair.caption())
                labels.append(answers(pair))
            else:
                scene = all_scenes()[rng.integers(len(all_scenes()))]
                prompts.append(caption(scene))
                none = [4, 8, 6]  # no relation, no second object
                labels.append(
                    [
                        COLOURS.index(scene.colour),
                        SHAPES.index(scene.shape),
                        *none,
                        BACKGROUNDS.index(scene.background),
                        int(scene.size == "large"),
                    ]
                )
        states = net(words(prompts)).last_hidden_state[:, -3:]
        truth = torch.tensor(labels)
        parts = head(states).split(sizes, dim=-1)
        loss = torch.stack(
            [functional.cross_entropy(part.flatten(0, 1), truth[:, i].repeat_interleave(3))
             for i, part in enumerate(parts)]
        ).sum()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 499:
            print(f"text: step {step + 1}, loss {loss.item():.4f}", flush=True)
    torch.save(net.state_dict(), path)
    return net.eval().requires_grad_(False)


def batch_of(rng: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    prompts, pictures = [], []
    for _ in range(count):
        if rng.random() < 0.7:
            pair = random_pair(rng)
            prompts.append(pair.caption())
            pictures.append(draw_pair(pair, rng))
        else:
            scene = all_scenes()[rng.integers(len(all_scenes()))]
            prompts.append(caption(scene))
            pictures.append(draw(scene, rng))
    return prompts, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def pictures_of(
    prompts: list[str],
    words: Words,
    text: torch.nn.Module,
    unet: torch.nn.Module,
    vae: AutoencoderKL,
) -> np.ndarray:
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    images = []
    for start in range(0, len(prompts), 50):
        part = prompts[start : start + 50]
        states = text(words([*part, *[EMPTY] * len(part)])).last_hidden_state
        generator = torch.Generator().manual_seed(9_000_000 + start)
        latent = torch.randn(len(part), 4, 16, 16, generator=generator)
        for t in scheduler.timesteps:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                both = unet(latent.repeat(2, 1, 1, 1), t, states).sample.float()
            yes, no = both.chunk(2)
            latent = scheduler.step(no + 3.0 * (yes - no), t, latent).prev_sample
        images.append(pixels_from(vae.decode(latent / vae.config.scaling_factor).sample))
    return np.concatenate(images)


def judge(name: str, images: np.ndarray, pairs: list[Pair]) -> None:
    counts: Counter[str] = Counter()
    for image, pair in zip(images, pairs, strict=True):
        got, want = read_pair(image), wanted(pair)
        if got is None:
            counts["unreadable"] += 1
        elif got == want:
            counts["right"] += 1
        else:
            names = ("objects", "relation", "background")
            counts[
                "wrong " + "+".join(n for n, a, b in zip(names, got, want, strict=True) if a != b)
            ] += 1
    shares = ", ".join(f"{what} {n / len(pairs):.1%}" for what, n in counts.most_common())
    print(f"{name} ({len(pairs)} pictures): {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--judge-every", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=100)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(SHAPES_LCM / "vae", torch_dtype=torch.float32)
    vae.eval().requires_grad_(False)
    rng = np.random.default_rng(11)
    judged = [random_pair(rng) for _ in range(options.pairs)]
    drawn = np.stack([draw_pair(pair, rng) for pair in judged])
    judge("drawn", drawn, judged)
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        back = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    judge("through the autoencoder", pixels_from(back), judged)

    words = Words()
    text = train_text(words, options.work, np.random.default_rng(12))
    unet = UNet2DConditionModel.from_pretrained(TEACHER, torch_dtype=torch.float32)
    prepare_for_training(unet.train().requires_grad_(True))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=7e-4, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=7e-4, total_steps=options.steps, pct_start=0.1
    )
    import copy

    average = copy.deepcopy(unet).requires_grad_(False)
    phase = Phase("two_objects", options.work, options.steps, {"unet": unet}, optimizer, schedule,
                  {"unet": average})  # fmt: skip
    phase.resume()
    alphas = signal_levels("cpu")
    odds = timestep_odds(alphas)
    while phase.step < phase.steps:
        rng = np.random.default_rng([13, phase.step])
        prompts, images = batch_of(rng, BATCH)
        prompts = [EMPTY if rng.random() < 0.1 else prompt for prompt in prompts]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            clean = vae.encode(images).latent_dist.sample().float() * vae.config.scaling_factor
            states = text(words(prompts)).last_hidden_state.float()
        noise = torch.randn_like(clean)
        t = torch.multinomial(odds, BATCH, replacement=True)
        level = alphas[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guess = unet(level.sqrt() * clean + (1 - level).sqrt() * noise, t, states).sample
        phase.take_step((guess.float() - noise).square().mean(), 0.995)
        if phase.step % options.judge_every == 0 or phase.step == phase.steps:
            prompts = [pair.caption() for pair in judged]
            judge(f"step {phase.step}", pictures_of(prompts, words, text, average, vae), judged)


if __name__ == "__main__":
    main()
