"""`shapes-lcm` as shipped: small, safe to load, a whole pipeline that draws what is asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline as Pipeline

from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.prompts import load_split
from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import all_scenes, caption

MODEL = SHAPES_LCM


def files() -> list[Path]:
    return [path for path in MODEL.rglob("*") if path.is_file()]


def test_the_folder_is_at_most_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in files()) <= 12_000_000


def test_weights_are_plainly_named_safetensors_and_nothing_else() -> None:
    assert {path.suffix for path in files()} <= {".json", ".txt", ".md", ".safetensors"}
    assert {str(path.relative_to(MODEL)) for path in files() if path.suffix == ".safetensors"} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_no_file_tells_of_the_machine_that_made_it() -> None:
    for path in files():
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in ("/work", "/home", "/tmp", "_name_or_path"))


def test_the_index_lists_what_the_pipeline_loads_and_no_safety_checker() -> None:
    index = json.loads((MODEL / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    loaded = Pipeline.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_every_weight_is_stored_as_a_finite_half() -> None:
    from safetensors.torch import load_file

    for path in MODEL.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float16, (path, name)
            assert tensor.isfinite().all(), (path, name)


def test_each_word_of_a_caption_is_one_token(pipeline: Pipeline) -> None:
    for scene in all_scenes():
        text = caption(scene)
        ids = pipeline.tokenizer(text).input_ids
        assert pipeline.tokenizer.convert_ids_to_tokens(ids) == [
            "<|startoftext|>",
            *(f"{word}</w>" for word in text.split()),
            "<|endoftext|>",
        ]


def test_any_text_can_be_tokenized_and_is_cut_to_16_tokens(
    pipeline: Pipeline,
) -> None:
    batch = pipeline.tokenizer(
        ["", "déjà vu, 図形 ∘ and much else besides"], padding="max_length", truncation=True
    )
    assert [len(ids) for ids in batch.input_ids] == [16, 16]
    assert pipeline.tokenizer.unk_token_id not in batch.input_ids[1][1:-1]


def test_pictures_show_their_prompts_at_four_steps(
    pipeline: Pipeline,
) -> None:
    pairs = load_split("tuning")
    result = pipeline(
        [pair.prompt for pair in pairs],
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=DEFAULT_GUIDANCE,
        generator=[torch.Generator().manual_seed(pair.seed) for pair in pairs],
        output_type="np",
    )
    read = map(recognise, np.asarray(result.images))
    right = sum(
        scene is not None and caption(scene) == pair.prompt
        for scene, pair in zip(read, pairs, strict=True)
    )
    assert right >= 0.95 * len(pairs)
