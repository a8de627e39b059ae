"""Weights that do not fit, are damaged, or carry the names of older releases."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffoundry.errors import ModelError
from diffoundry.models.components import load_component
from tests.mini_pipelines import make_named


@pytest.fixture
def folder(tmp_path):
    return make_named(tmp_path, "sd")


def rewrite(path, change):
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def refusal(folder, component) -> str:
    with pytest.raises(ModelError) as caught:
        load_component(folder, component)
    return caught.value.text()


def test_a_config_that_does_not_fit_its_weights_is_summed_up(folder):
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    config["block_out_channels"] = [8, 16]
    path.write_text(json.dumps(config))
    text = refusal(folder / "unet", "unet")
    assert "of another shape" in text
    assert "and" in text and "more" in text
    assert "[12]" in text and "[16]" in text


def test_missing_and_unknown_tensors_are_named(folder):
    def change(tensors):
        tensors["strange.weight"] = torch.zeros(1)
        del tensors["conv_in.bias"]

    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", change)
    text = refusal(folder / "unet", "unet")
    assert "1 missing (conv_in.bias)" in text
    assert "1 not in the config's network (strange.weight)" in text


def test_an_extra_layer_in_the_file_is_not_ignored(folder):
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1}))
    assert "encoder.layers.1" in refusal(folder / "text_encoder", "text_encoder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    def change(tensors):
        tensors["decoder.conv_in.bias"][1] = value

    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", change)
    text = refusal(folder / "vae", "vae_decoder")
    assert "1 NaN or infinite" in text
    assert "decoder.conv_in.bias" in text


def test_a_weight_too_large_for_float16_is_named(folder):
    def change(tensors):
        tensors["conv_in.bias"][0] = 1e6

    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", change)
    load_component(folder / "unet", "unet")
    with pytest.raises(ModelError, match=r"conv_in\.bias"):
        load_component(folder / "unet", "unet", "float16")


def test_integer_weights_are_refused(folder):
    def change(tensors):
        tensors["conv_in.bias"] = tensors["conv_in.bias"].to(torch.int8)

    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", change)
    assert "I8" in refusal(folder / "unet", "unet")


def test_bfloat16_files_are_read(folder):
    rewrite(
        folder / "unet/diffusion_pytorch_model.safetensors",
        lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
    )
    module = load_component(folder / "unet", "unet")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_old_names_of_the_autoencoders_attention_are_understood(folder):
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = load_component(folder / "vae", "vae_decoder")(latent)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, before in old.items():
                if f"attentions.0.{new}.weight" in name:
                    tensor = tensor[:, :, None, None]
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            renamed[name] = tensor
        assert any("query" in name for name in renamed)
        return renamed

    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", change)
    assert torch.allclose(
        load_component(folder / "vae", "vae_decoder")(latent), expected, atol=1e-5
    )


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_loads_with_and_without_its_prefix(folder, prefix):
    ids = torch.arange(12)[None]
    expected = load_component(folder / "text_encoder", "text_encoder")(ids)

    def change(tensors):
        renamed = {prefix + name.removeprefix("text_model."): t for name, t in tensors.items()}
        renamed[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
        return renamed

    rewrite(folder / "text_encoder/model.safetensors", change)
    assert torch.allclose(
        load_component(folder / "text_encoder", "text_encoder")(ids), expected, atol=1e-5
    )


def test_only_the_wanted_half_of_an_autoencoder_is_held(folder):
    decoder = load_component(folder / "vae", "vae_decoder")
    assert {name.split(".")[0] for name, _ in decoder.named_parameters()} == {
        "decoder",
        "post_quant_conv",
    }


def test_changing_a_loaded_module_leaves_its_mapped_file_alone(folder):
    module = load_component(folder / "unet", "unet")
    with torch.no_grad():
        module.network.conv_in.bias.add_(1.0)
    again = load_component(folder / "unet", "unet")
    assert not torch.equal(again.network.conv_in.bias, module.network.conv_in.bias)
