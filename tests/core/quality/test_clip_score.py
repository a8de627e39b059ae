"""CLIP score and CLIP features over a real, tiny CLIP model in a local folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import ModelError
from diffoundry.quality.clip_score import Clip, open_clip, scores
from tests.core.quality.weights import add_noise, make_clip, make_pictures

PROMPTS = ["a small red circle", "a large blue square", "a ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return open_clip(folder)


def test_the_score_is_a_hundred_cosines_and_never_negative() -> None:
    one = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    other = np.array([[6.0, 8.0], [1.0, 1.0], [-1.0, 0.1]])
    assert scores(one, other) == pytest.approx([100, 100 / 2**0.5, 0])


def test_features_are_those_of_the_model_itself(clip: Clip, folder: Path) -> None:
    """transformers' own preprocessing and its normalised embeddings give the same scores."""
    import torch
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = make_pictures(3, 0, side=50)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = processor(pictures, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(tokens.input_ids, pixels, tokens.attention_mask)
    wanted = 100 * (out.image_embeds * out.text_embeds).sum(-1).clamp(min=0).numpy()
    found = scores(clip.image_features(pictures), clip.text_features(PROMPTS))
    assert found == pytest.approx(wanted, abs=1e-3)


def test_noise_moves_the_features_further_and_further(clip: Clip) -> None:
    pictures = make_pictures(4, 1)
    plain = clip.image_features(pictures)
    gaps = [np.abs(clip.image_features(add_noise(pictures, s)) - plain).sum() for s in (0, 8, 60)]
    assert gaps[0] == 0 < gaps[1] < gaps[2]


def test_a_prompt_that_is_too_long_is_cut_off(clip: Clip) -> None:
    found = clip.text_features([" ".join(["red"] * 50)])
    assert found.shape == (1, 12) and np.isfinite(found).all()


def test_without_preprocessing_the_usual_one_holds(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    assert open_clip(tmp_path / "clip").preprocessing.crop == 32


def change(folder: Path, target: Path, fault: str) -> Path:
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    if fault == "pickle":
        weights.rename(target / "pytorch_model.bin")
    elif fault == "absent":
        weights.unlink()
    elif fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "another network":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["visual_projection.weight"]
        save_file(tensors, weights, {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("pickle", "pytorch_model.bin: a pickle, which can run code"),
        ("absent", "none"),
        ("cut off", "cut off"),
        ("another network", "'siglip'"),
        ("a tensor missing", "1 missing or of another shape: visual_projection.weight"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    fault: str, words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as error:
        open_clip(change(folder, tmp_path / "clip", fault))
    assert words in str(error.value)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        open_clip(tmp_path / "clip")
