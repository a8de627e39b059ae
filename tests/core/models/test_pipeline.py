"""Opening a pipeline: its geometry, and a clear refusal of everything that is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffoundry.errors import ExitCode, ModelError
from diffoundry.models.pipeline import open_pipeline
from tests.mini_pipelines import PIPELINES, make_named, make_pipeline


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("pipelines") / "sd", "sd")


@pytest.fixture
def folder(original, tmp_path):
    """A copy of a good pipeline, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "sd"))


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(folder, **options) -> str:
    with pytest.raises(ModelError) as caught:
        open_pipeline(folder, **options)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.text()


EXPECTED_GEOMETRY = {
    "lcm": {"is_lcm": True, "guidance_embedding_dim": 16, "vae_factor": 2},
    "sd": {"is_lcm": False, "guidance_embedding_dim": None, "latent_scaling_factor": 0.5},
    "odd_widths": {"latent_channels": 3, "text_width": 14},
    "three_levels": {"vae_factor": 4, "pixel_multiple_of": 16, "native_width_pixels": 32},
    "four_levels": {"vae_factor": 8, "pixel_multiple_of": 64, "sample_size_pixels": 128},
    "tokens_24": {"tokens": 24},
    "sd2": {"prediction_type": "v_prediction"},
    "autoencoder_tiny": {"vae_factor": 4, "latent_scaling_factor": 1.0},
    "fp16_variant": {"is_lcm": True},
    "sharded": {"is_lcm": False},
    "no_mid_block": {"pixel_multiple_of": 4},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_geometry_comes_from_the_configs(name, tmp_path):
    source = open_pipeline(make_named(tmp_path / name, name))
    found = {field: getattr(source.geometry, field) for field in EXPECTED_GEOMETRY[name]}
    assert found == EXPECTED_GEOMETRY[name]
    assert list(source.components) == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    assert all(component.weights for component in source.components.values())


def test_says_what_is_left_out(folder):
    assert open_pipeline(folder).left_out == ("feature_extractor", "safety_checker")


def test_names_the_scheduler_that_the_index_names(folder):
    edit(folder / "scheduler/scheduler_config.json", _class_name="Another")
    assert open_pipeline(folder).scheduler["_class_name"] == "PNDMScheduler"


def test_opening_imports_no_heavy_package(folder):
    code = (
        "import sys; from diffoundry.models import pipeline, contracts, tokenizer;"
        f"pipeline.open_pipeline({str(folder)!r});"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_takes_sizes_that_are_not_square(folder):
    edit(folder / "unet/config.json", sample_size=[8, 12])
    geometry = open_pipeline(folder).geometry
    assert (geometry.native_height_pixels, geometry.native_width_pixels) == (16, 24)


def test_the_first_diffusers_releases_wrote_a_wrong_sample_size(folder):
    edit(folder / "unet/config.json", sample_size=32, _diffusers_version="0.8.1")
    assert open_pipeline(folder).geometry.native_height_pixels == 64 * 2


def test_without_a_model_max_length_the_positions_count(folder):
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=int(1e30))
    assert open_pipeline(folder).geometry.tokens == 12


def test_a_missing_scaling_factor_is_what_diffusers_assumes(folder):
    path = folder / "vae/config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    from diffusers import AutoencoderKL

    assumed = AutoencoderKL.from_config(config).config.scaling_factor
    assert open_pipeline(folder).geometry.latent_scaling_factor == assumed


def test_refuses_a_missing_directory(tmp_path):
    assert "no such directory" in refusal(tmp_path / "nothing")


def test_refuses_a_directory_that_is_no_pipeline(tmp_path):
    assert "without model_index.json" in refusal(tmp_path)


def test_refuses_a_single_checkpoint_file_and_says_how_to_convert(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 16)
    assert "from_single_file" in refusal(path)


def test_refuses_a_revision_of_a_directory(folder):
    assert "revision" in refusal(folder, revision="main")


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_refuses_bad_json_and_names_the_file(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert name in refusal(folder)


def test_refuses_other_pipeline_classes_with_the_list(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    text = refusal(folder)
    assert "StableDiffusionXLPipeline" in text
    assert "StableDiffusionPipeline" in text
    assert "LatentConsistencyModelPipeline" in text


@pytest.mark.parametrize(
    ("part", "entry", "named"),
    [
        ("controlnet", ["diffusers", "ControlNetModel"], "controlnet"),
        ("text_encoder", ["transformers", "BertModel"], "BertModel"),
        ("vae", ["diffusers", "VQModel"], "VQModel"),
        ("unet", None, "unet"),
        ("scheduler", None, "scheduler"),
    ],
)
def test_refuses_unknown_and_missing_parts(folder, part, entry, named):
    edit(folder / "model_index.json", **{part: entry})
    assert named in refusal(folder)


def test_refuses_code_named_in_the_index(folder):
    edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    text = refusal(folder)
    assert "my_unet.MyUNet" in text
    assert "code from a model is never run" in text


def test_refuses_a_pipeline_of_custom_code(folder):
    edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    assert "pipeline.MyPipeline" in refusal(folder)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("unet/config.json", {"auto_map": {"AutoModel": "code.MyModel"}}),
        ("text_encoder/config.json", {"trust_remote_code": True}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.T", None]}}),
    ],
)
def test_refuses_code_named_in_a_config(folder, path, fields):
    edit(folder / path, **fields)
    text = refusal(folder)
    assert next(iter(fields)) in text
    assert "never run" in text


def test_python_files_in_the_directory_are_never_run(folder):
    for place in (folder, folder / "unet", folder / "tokenizer"):
        (place / "__init__.py").write_text("raise SystemExit('run')")
    open_pipeline(folder)


def test_refuses_a_config_of_another_class(folder):
    edit(folder / "unet/config.json", _class_name="UNet2DModel")
    assert "UNet2DModel" in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"addition_embed_type": "text_time"},
        {"class_embed_type": "timestep"},
        {"encoder_hid_dim_type": "text_proj"},
        {"num_class_embeds": 10},
        {"attention_type": "gated"},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"down_block_types": ["KDownBlock2D", "DownBlock2D"]},
    ],
)
def test_refuses_unet_features_outside_the_contract(folder, fields):
    edit(folder / "unet/config.json", **fields)
    text = refusal(folder)
    assert next(iter(fields)) in text


def test_names_every_feature_at_once(folder):
    edit(folder / "unet/config.json", class_embed_type="timestep", addition_embed_type="text")
    text = refusal(folder)
    assert "class_embed_type" in text
    assert "addition_embed_type" in text


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"cross_attention_dim": 32}, "hidden_size"),
        ("unet/config.json", {"sample_size": None}, "sample_size"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("vae/config.json", {"out_channels": 4}, "RGB"),
        ("text_encoder/config.json", {"vocab_size": 100}, "vocab_size"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 99}, "positions"),
    ],
)
def test_refuses_parts_that_do_not_fit_each_other(folder, path, fields, named):
    edit(folder / path, **fields)
    assert named in refusal(folder)


def test_refuses_an_uneven_tiny_autoencoder(tmp_path):
    folder = make_pipeline(tmp_path, **PIPELINES["autoencoder_tiny"])
    edit(folder / "vae/config.json", upsampling_scaling_factor=3)
    assert "encoder 4x, decoder 9x" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt"])
def test_refuses_pickles_with_the_reason_and_the_way_out(folder, name):
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder" / name)
    text = refusal(folder)
    assert name in text
    assert "run code" in text
    assert "safe_serialization=True" in text


def test_refuses_missing_weights(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert "no weights" in refusal(folder)


def test_refuses_truncated_weights_before_anything_is_loaded(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    text = refusal(folder)
    assert "cut off" in text
    assert path.name in text


@pytest.mark.parametrize("part", ["unet", "scheduler", "tokenizer"])
def test_refuses_a_missing_folder(folder, part):
    shutil.rmtree(folder / part)
    assert part in refusal(folder)


def test_refuses_a_link_out_of_the_directory(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").symlink_to(secret)
    assert "link" in refusal(folder)


def test_opens_a_snapshot_of_the_hub_cache_whose_files_are_links(folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    assert open_pipeline(snapshot).geometry == open_pipeline(folder).geometry
