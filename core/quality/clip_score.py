"""CLIP: how well a picture fits its prompt, and features for CLIP-FID, from a local folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffoundry.errors import ModelError
from diffoundry.formats.safetensors_file import read_header
from diffoundry.quality.resizing import crop_centre, resize_shorter_side
from diffoundry.quality.weights import SUFFIX, need_torch
from diffoundry.types import Array

if TYPE_CHECKING:
    import torch

WHERE = "CLIP model"
BATCH = 16
# OpenAI's, for folders without preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to resize to, side of the middle that is cut out, and normalisation in 0..1."""

    side: int
    crop: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, picture: Array) -> Array:
        """uint8 [h, w, 3] -> float32 [3, crop, crop]."""
        middle = crop_centre(resize_shorter_side(picture, self.side), self.crop, self.crop)
        scaled = (middle / 255 - np.array(self.mean)) / np.array(self.std)
        return scaled.astype(np.float32).transpose(2, 0, 1)


@dataclass(frozen=True)
class Clip:
    """An opened CLIP model. Features come normalised only where `scores` compares them."""

    model: Any
    tokenizer: Any
    preprocessing: Preprocessing

    def image_features(self, pictures: Sequence[Array]) -> Array:
        """Projected features of uint8 pictures, not normalised: float32 [n, d]."""
        import torch

        found = []
        with torch.no_grad():
            for start in range(0, len(pictures), BATCH):
                part = [self.preprocessing(one) for one in pictures[start : start + BATCH]]
                pixels = torch.from_numpy(np.stack(part))
                found.append(_values(self.model.get_image_features(pixel_values=pixels)))
        return np.concatenate(found)

    def text_features(self, prompts: Sequence[str]) -> Array:
        """Projected features of texts, cut off where the model ends (77 tokens): float32 [n, d]."""
        import torch

        found = []
        with torch.no_grad():
            for start in range(0, len(prompts), BATCH):
                tokens = self.tokenizer(
                    list(prompts[start : start + BATCH]),
                    padding=True,
                    truncation=True,
                    max_length=self.model.config.text_config.max_position_embeddings,
                    return_tensors="pt",
                )
                found.append(
                    _values(
                        self.model.get_text_features(
                            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
                        )
                    )
                )
        return np.concatenate(found)


def scores(image_features: Array, text_features: Array) -> Array:
    """100 × the cosine of picture and prompt, negative ones as 0: float64 [n] in 0..100.

    Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", on
    the scale that has become usual (100 where the paper has 2.5) and without its prompt's prefix.
    """
    one, other = (f.astype(np.float64) for f in (image_features, text_features))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return 100 * np.maximum(0.0, (one * other).sum(1) / norms)


def open_clip(folder: Path) -> Clip:
    """The folder's model and tokenizer, float32 on the CPU. Nothing is fetched.

    Raises ModelError: no safetensors weights, another architecture, tensors that are missing.
    """
    need_torch("CLIP score")
    import torch
    from transformers import AutoTokenizer, CLIPModel

    config = _check_folder(folder)
    try:
        model, said = CLIPModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{WHERE} {folder}",
            expected="a CLIP model with its tokenizer, as transformers saves them",
            found=str(error).splitlines()[0],
            remedy="save it again with save_pretrained, tokenizer too",
        ) from error
    # transformers would go on with random values.
    missing = sorted(map(str, [*said["missing_keys"], *said.get("mismatched_keys", [])]))
    if missing:
        raise ModelError(
            f"{WHERE} {folder}",
            expected="every tensor of the model that config.json describes",
            found=f"{len(missing)} missing or of another shape: {', '.join(missing)}",
            remedy="copy the folder again, or name a whole CLIP model (text and vision)",
        )
    return Clip(model.eval().requires_grad_(False), tokenizer, _preprocessing(folder, config))


def _check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config, after everything that needs no torch has been looked at."""
    where = f"{WHERE} {folder}"
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            where,
            expected="a folder with config.json, model.safetensors and a tokenizer",
            found="no config.json" if folder.is_dir() else "no such folder",
            remedy="name the folder of a CLIP model in transformers' layout",
        )
    try:
        document: dict[str, Any] = json.loads(config.read_text("utf-8"))
        kind = document.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(
            where, expected="JSON in config.json", found=str(error), remedy="copy it again"
        ) from error
    if kind != "clip":
        raise ModelError(
            where,
            expected='"model_type": "clip" in config.json: text and vision',
            found=repr(kind),
            remedy="name a whole CLIP model, not one half of it or another network",
        )
    weights = sorted(folder.glob(f"model*{SUFFIX}"))
    if not weights:
        pickles = [p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
        raise ModelError(
            where,
            expected="model.safetensors",
            found=f"{', '.join(pickles)}: a pickle, which can run code" if pickles else "none",
            remedy="load it where you trust it and save_pretrained it: that writes safetensors",
        )
    for path in weights:
        read_header(path)
    return document


def _preprocessing(folder: Path, config: dict[str, Any]) -> Preprocessing:
    """What preprocessor_config.json says, else OpenAI's for the size in the model's config."""
    usual = int(config.get("vision_config", {}).get("image_size", 224))
    path = folder / "preprocessor_config.json"
    document = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return Preprocessing(
        side=_side(document.get("size"), usual),
        crop=_side(document.get("crop_size"), usual),
        mean=tuple(document.get("image_mean", MEAN)),
        std=tuple(document.get("image_std", STD)),
    )


def _side(size: Any, usual: int) -> int:
    """A size as transformers writes it: 224, {"shortest_edge": 224}, {"height": 224, …}."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return int(size) if size else usual


def _values(output: Any) -> Array:
    """The features, which transformers 5 puts into an output object and 4 returned bare."""
    tensor: torch.Tensor = getattr(output, "pooler_output", output)
    return np.asarray(tensor.numpy(), np.float32)
