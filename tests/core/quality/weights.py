"""Weights of metrics, small or random, made by the tests themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from diffoundry.quality.inception import Inception
from diffoundry.quality.lpips import Trunk, wanted_tensors
from tests.mini_pipelines import build_merges, build_vocabulary, write_tokenizer


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A real CLIP model of a few thousand weights, with tokenizer and preprocessing."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    folder.mkdir(parents=True)
    write_tokenizer(folder, tokens=16)
    vocabulary = len(build_vocabulary(build_merges()))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "projection_dim": 12}  # fmt: skip
    text = CLIPTextConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=16,
                          bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
                          pad_token_id=vocabulary - 1)  # fmt: skip
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(),
                        projection_dim=12)  # fmt: skip
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    preprocessing = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def lpips_tensors(trunk: Trunk, seed: int = 0, spelling: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under torchvision's names (0) or the lpips package's (1)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for shape, names in wanted_tensors(trunk).values():
        value = torch.randn(shape, generator=draw) * (2 / max(1, np.prod(shape[1:]))) ** 0.5
        name = names[min(spelling, len(names) - 1)]
        tensors[name] = value.abs() if name.startswith("lin") else value
    return tensors


def make_lpips(path: Path, trunk: Trunk, seed: int = 0, spelling: int = 0) -> Path:
    """A file of `lpips_tensors`."""
    save_file(lpips_tensors(trunk, seed, spelling), path)
    return path


def make_inception(path: Path) -> Path:
    """Random weights of the FID network, 87 MB, with the classifier that the usual file has."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def make_pictures(count: int, seed: int, side: int = 64) -> list[np.ndarray]:
    """Smooth coloured pictures, uint8 [side, side, 3]."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    return [np.asarray(Image.fromarray(c).resize((side, side))) for c in coarse]


def add_noise(pictures: list[np.ndarray], sigma: float, seed: int = 0) -> list[np.ndarray]:
    """The same noise for every sigma, scaled."""
    rng = np.random.default_rng(seed)
    noisy = [one + sigma * rng.standard_normal(one.shape) for one in pictures]
    return [np.rint(np.clip(one, 0, 255)).astype(np.uint8) for one in noisy]
