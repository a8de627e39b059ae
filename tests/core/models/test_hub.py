"""Models from the hub: which files, which revision, and what happens without a network."""

from types import SimpleNamespace

import pytest

from diffoundry.errors import ModelError
from diffoundry.models.hub import choose_files, is_hub_id
from diffoundry.models.pipeline import open_pipeline
from tests.mini_pipelines import make_named

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = [
    "model_index.json",
    "v1-5-pruned.safetensors",
    "README.md",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/code.py",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "safety_checker/model.safetensors",
    "tokenizer/merges.txt",
    "scheduler/scheduler_config.json",
]


def test_only_what_a_pipeline_needs_is_fetched():
    assert sorted(choose_files("owner/name", REPOSITORY)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched():
    with pytest.raises(ModelError, match="run code"):
        choose_files("owner/name", ["model_index.json", "unet/diffusion_pytorch_model.bin"])


@pytest.mark.parametrize("model", ["./a/b", "/a/b", "a/b/c", "name", "../x", "a/"])
def test_paths_are_not_taken_for_hub_ids(model):
    assert not is_hub_id(model)
    with pytest.raises(ModelError, match="no such directory"):
        open_pipeline(f"{model}-that-is-not-there")


def test_offline_says_so():
    with pytest.raises(ModelError, match="offline mode") as caught:
        open_pipeline("owner/name")
    assert "network" in caught.value.remedy


def test_a_pinned_revision_that_is_not_in_the_cache_says_so_offline():
    with pytest.raises(ModelError, match="hub does not give it"):
        open_pipeline("owner/name", COMMIT)


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_revision_is_resolved_to_its_commit_first_and_reported(tmp_path, monkeypatch, revision):
    import huggingface_hub

    folder = make_named(tmp_path, "sd")
    asked = {}

    def model_info(self, model, revision):
        asked["info"] = (model, revision)
        files = [SimpleNamespace(rfilename=name) for name in REPOSITORY]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def snapshot_download(model, **options):
        asked["download"] = options
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_pipeline("owner/name", revision)
    assert source.revision == COMMIT
    assert asked["info"] == ("owner/name", revision)
    assert asked["download"]["revision"] == COMMIT
    assert not any(name.endswith((".bin", ".py")) for name in asked["download"]["allow_patterns"])


def test_a_directory_of_that_name_goes_first(tmp_path, monkeypatch):
    make_named(tmp_path / "owner/name", "sd")
    monkeypatch.chdir(tmp_path)
    assert open_pipeline("owner/name").revision is None
