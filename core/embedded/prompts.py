"""The committed prompt and seed pairs of `shapes-lcm`: calibration, tuning, evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

import numpy as np

from diffoundry.embedded.scenes import all_scenes, caption

SPLIT_SIZES: Mapping[str, int] = MappingProxyType(
    {"calibration": 32, "tuning": 32, "evaluation": 500}
)
SPLIT_SEED = 64_016


@dataclass(frozen=True)
class PromptSeed:
    """A prompt and the seed, in 0..2^31-1, of the noise that its picture starts from."""

    prompt: str
    seed: int


def load_split(name: str) -> tuple[PromptSeed, ...]:
    """The pairs of one split of `splits.json`, in order. Raises ValueError for an unknown name.

    No prompt and no seed stands in two splits, or twice in one.
    """
    text = resources.files(__package__).joinpath("splits.json").read_text(encoding="utf-8")
    splits = json.loads(text)
    if name not in splits:
        raise ValueError(f"unknown split {name!r}; known: {', '.join(splits)}")
    return tuple(PromptSeed(pair["prompt"], pair["seed"]) for pair in splits[name])


def make_splits() -> dict[str, tuple[PromptSeed, ...]]:
    """Makes the splits anew, the same ones every time: `splits.json` holds their text."""
    rng = np.random.default_rng(SPLIT_SEED)
    total = sum(SPLIT_SIZES.values())
    order = rng.permutation(len(all_scenes()))[:total]
    seeds = np.unique(rng.integers(0, 2**31, size=2 * total))
    chosen = rng.permutation(seeds)[:total]
    pairs = [
        PromptSeed(caption(all_scenes()[scene]), int(seed))
        for scene, seed in zip(order, chosen, strict=True)
    ]
    splits: dict[str, tuple[PromptSeed, ...]] = {}
    start = 0
    for name, size in SPLIT_SIZES.items():
        splits[name] = tuple(pairs[start : start + size])
        start += size
    return splits


def splits_as_json(splits: Mapping[str, tuple[PromptSeed, ...]]) -> str:
    """The text of `splits.json`: one pair a line."""
    blocks = []
    for name, pairs in splits.items():
        lines = [json.dumps({"prompt": p.prompt, "seed": p.seed}) for p in pairs]
        blocks.append(f'  "{name}": [\n    ' + ",\n    ".join(lines) + "\n  ]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
