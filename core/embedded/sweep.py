"""How the number of steps and the guidance change what `shapes-lcm` draws; a figure and its data.

    python -m diffoundry.embedded.sweep --model DIR --out docs/guidance-steps

It writes `OUT.json` and `OUT.svg`; no path stands in them. The pairs of prompt and seed are the
tuning split and freshly drawn ones, never those of the evaluation: choosing a default from this
figure must not choose by the pairs that later judge it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.prompts import PromptSeed, load_split
from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import all_scenes, caption
from diffoundry.embedded.sweep_chart import Panel, draw_panels
from diffoundry.formats.canonical import atomic_write, pretty_json, tree_digest

if TYPE_CHECKING:
    from diffusers import LatentConsistencyModelPipeline

STEPS = (1, 2, 3, 4, 6, 8)
GUIDANCES = (1.0, 2.0, 3.0, 5.0, 7.0)
DEFAULT_STEPS = 4
PAIRS = 100
FRESH_SEED = 64_017
FIRST_FRESH = 2**31
"""Seeds of every committed split lie below it: fresh ones differ without a look at them."""
Sample = Callable[[Sequence[PromptSeed], int, float], np.ndarray]
"""Pairs, steps, guidance -> pictures [n, 64, 64, 3], float in 0..1."""


@dataclass(frozen=True)
class Point:
    """One setting's figures. `accuracy` is the share of pictures that show their whole prompt,
    `low` and `high` its 95 % interval (Wilson 1927); unreadable pictures count as wrong."""

    steps: int
    guidance: float
    pairs: int
    right: int
    unreadable: int
    accuracy: float
    low: float
    high: float


def sweep_pairs(count: int) -> tuple[PromptSeed, ...]:
    """The first `count` of: the tuning split, then pairs drawn from a seed of their own."""
    tuning = load_split("tuning")[:count]
    rng = np.random.default_rng(FRESH_SEED)
    missing = count - len(tuning)
    scenes = rng.integers(0, len(all_scenes()), size=missing)
    seeds = FIRST_FRESH + rng.choice(2**31, size=missing, replace=False)
    fresh = [
        PromptSeed(caption(all_scenes()[scene]), int(seed))
        for scene, seed in zip(scenes, seeds, strict=True)
    ]
    return (*tuning, *fresh)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of the share `hits` / `count` (Wilson 1927)."""
    z = 1.959963984540054
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = (share * (1 - share) * spread + spread * spread / 4) ** 0.5 / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(sample: Sample, pairs: Sequence[PromptSeed], steps: int, guidance: float) -> Point:
    """Draw every pair at one setting and read the pictures back."""
    read = [recognise(image) for image in sample(pairs, steps, guidance)]
    right = sum(
        scene is not None and caption(scene) == pair.prompt
        for scene, pair in zip(read, pairs, strict=True)
    )
    low, high = wilson(right, len(pairs))
    return Point(
        steps, guidance, len(pairs), right, read.count(None), right / len(pairs), low, high
    )


def sweep(
    sample: Sample, pairs: Sequence[PromptSeed], say: Callable[[str], None] = lambda line: None
) -> list[Point]:
    """Every number of steps at the default guidance, every guidance at the default steps."""
    settings = [(steps, DEFAULT_GUIDANCE) for steps in STEPS]
    settings += [(DEFAULT_STEPS, g) for g in GUIDANCES if g != DEFAULT_GUIDANCE]
    points = []
    for steps, guidance in settings:
        points.append(measure(sample, pairs, steps, guidance))
        one = points[-1]
        say(
            f"{steps} steps, guidance {guidance:g}: {one.accuracy:.1%} right "
            f"({one.low:.1%} to {one.high:.1%}), {one.unreadable} unreadable"
        )
    return points


def chart(points: Sequence[Point]) -> str:
    """The SVG: accuracy against steps, and against guidance."""
    by_steps = sorted((p for p in points if p.guidance == DEFAULT_GUIDANCE), key=lambda p: p.steps)
    by_guidance = sorted((p for p in points if p.steps == DEFAULT_STEPS), key=lambda p: p.guidance)
    panels = (
        Panel(
            f"Steps, at guidance {DEFAULT_GUIDANCE:g}",
            [(str(p.steps), p.accuracy, p.low, p.high) for p in by_steps],
            chosen=str(DEFAULT_STEPS),
        ),
        Panel(
            f"Guidance, at {DEFAULT_STEPS} steps",
            [(f"{p.guidance:g}", p.accuracy, p.low, p.high) for p in by_guidance],
            chosen=f"{DEFAULT_GUIDANCE:g}",
        ),
    )
    note = (
        f"Pictures that show their whole prompt, {points[0].pairs} pairs a point; bars: 95 % "
        "(Wilson). Ringed: the default."
    )
    return draw_panels(panels, "Prompt accuracy of shapes-lcm", note)


def pipeline_sample(pipeline: LatentConsistencyModelPipeline) -> Sample:
    """diffusers' own pipeline as a `Sample`."""
    from diffoundry.embedded.measure import sample_lcm

    return lambda pairs, steps, guidance: sample_lcm(
        pipeline, pairs, steps=steps, guidance=guidance
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the model in a folder and write the two files."""
    parser = argparse.ArgumentParser(description="How steps and guidance change what it draws.")
    parser.add_argument("--model", type=Path, default=SHAPES_LCM, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error("--pairs: at least 1")
    import torch
    from diffusers import LatentConsistencyModelPipeline

    pipeline = LatentConsistencyModelPipeline.from_pretrained(
        options.model, dtype=torch.float32, local_files_only=True
    )
    points = sweep(pipeline_sample(pipeline), sweep_pairs(options.pairs), print)
    document = {
        "model_digest": tree_digest(options.model),
        "pairs": f"the tuning split, then fresh ones (seed {FRESH_SEED}); none of the evaluation",
        "points": [asdict(point) for point in points],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.out.with_suffix(".json"), pretty_json(document))
    atomic_write(options.out.with_suffix(".svg"), chart(points))
    print(json.dumps([str(options.out.with_suffix(s)) for s in (".json", ".svg")]))


if __name__ == "__main__":
    main()
