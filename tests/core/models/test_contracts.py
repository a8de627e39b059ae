"""Axes as a profile asks for them, and the declared tensors of each component."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffoundry.errors import ModelError
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.geometry import Geometry
from diffoundry.models.pipeline import ComponentSource, PipelineSource
from diffoundry.types import Axis

GEOMETRY = Geometry(
    vae_factor=8,
    latent_channels=4,
    tokens=77,
    text_width=768,
    native_height_pixels=512,
    native_width_pixels=768,
    latent_scaling_factor=0.18215,
    latent_shift_factor=0.0,
    prediction_type="epsilon",
    guidance_embedding_dim=None,
    pixel_multiple_of=64,
    is_lcm=False,
)


@dataclass(frozen=True)
class Asked:
    min: float
    opt: float
    max: float
    unit: str = "pixels"


def source(vae="AutoencoderKL", **changes):
    names = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
    return PipelineSource(
        path=Path("model"),
        pipeline_class="StableDiffusionPipeline",
        components={name: ComponentSource(name, Path(name), vae, {}, ()) for name in names},
        scheduler={},
        tokenizer_path=Path("tokenizer"),
        geometry=dataclasses.replace(GEOMETRY, **changes),
        left_out=(),
    )


def refusal(requested) -> str:
    with pytest.raises(ModelError) as caught:
        native_axes(source(), requested)
    return caught.value.text()


def test_axes_that_are_not_asked_for_have_their_native_value():
    assert native_axes(source(), {}) == (
        Axis("batch", 1, 1, 1, 1),
        Axis("height", 512, 512, 512, 64),
        Axis("width", 768, 768, 768, 64),
    )


def test_pixels_are_taken_as_they_are():
    axes = native_axes(source(), {"height": Asked(256, 512, 1024), "batch": Asked(1, 1, 4)})
    assert axes[0] == Axis("batch", 1, 1, 4, 1)
    assert axes[1] == Axis("height", 256, 512, 1024, 64)


def test_native_fractions_are_rounded_to_what_the_model_can_take():
    axes = native_axes(source(), {"height": Asked(0.55, 1, 1.5, "native")})
    assert axes[1] == Axis("height", 256, 512, 768, 64)
    axes = native_axes(source(), {"width": Asked(0.001, 1, 1, "native")})
    assert axes[2].min == 64


def test_the_nearest_legal_values_are_named():
    text = refusal({"height": Asked(500, 512, 512)})
    assert "height min=500 is not a multiple of 64 (nearest: 448 and 512)" in text
    assert "(nearest: 64)" in refusal({"height": Asked(10, 512, 512)})


def test_all_mistakes_are_named_at_once():
    text = refusal(
        {"height": Asked(500, 512, 512), "depth": Asked(1, 1, 1), "batch": Asked(3, 2, 4)}
    )
    assert "height min=500" in text
    assert "unknown axis 'depth'" in text
    assert "batch: min=3, opt=2, max=4 do not rise" in text


@pytest.mark.parametrize("batch", [Asked(0, 1, 1), Asked(1, 1.5, 2), Asked(-1, 1, 1)])
def test_a_batch_is_a_whole_number(batch):
    assert "whole number" in refusal({"batch": batch})


def test_an_unknown_unit_is_refused():
    assert "'inches'" in refusal({"height": Asked(1, 1, 1, "inches")})


def described(contract):
    return [str(spec) for spec in contract.inputs], [str(spec) for spec in contract.outputs]


def test_contract_of_the_text_encoder():
    contract = contract_for(source(), "text_encoder", native_axes(source(), {}))
    assert described(contract) == (
        ["input_ids: int64[batch, 77]"],
        ["prompt_embeds: float32[batch, 77, 768]"],
    )
    assert [axis.name for axis in contract.axes] == ["batch"]


def test_contract_of_a_guided_unet():
    model = source(guidance_embedding_dim=256)
    contract = contract_for(model, "unet", native_axes(model, {}))
    assert described(contract) == (
        [
            "sample: float32[batch, 4, height/8, width/8]",
            "timestep: float32[batch]",
            "encoder_hidden_states: float32[batch, 77, 768]",
            "timestep_cond: float32[batch, 256]",
        ],
        ["model_output: float32[batch, 4, height/8, width/8]"],
    )
    assert contract.inputs[0].shape(contract.opt_shape()) == (1, 4, 64, 96)


def test_an_unguided_unet_has_no_timestep_cond():
    contract = contract_for(source(), "unet", native_axes(source(), {}))
    assert len(contract.inputs) == 3


@pytest.mark.parametrize(
    ("vae", "outputs"),
    [("AutoencoderKL", ["latent_mean", "latent_std"]), ("AutoencoderTiny", ["latent"])],
)
def test_contracts_of_the_autoencoder(vae, outputs):
    model = source(vae)
    encoder = contract_for(model, "vae_encoder", native_axes(model, {}))
    decoder = contract_for(model, "vae_decoder", native_axes(model, {}))
    assert [spec.name for spec in encoder.outputs] == outputs
    assert described(decoder) == (
        ["latent: float32[batch, 4, height/8, width/8]"],
        ["image: float32[batch, 3, height, width]"],
    )


def test_an_unknown_component_is_refused_with_the_list():
    with pytest.raises(ModelError, match="text_encoder, unet, vae_encoder, vae_decoder"):
        contract_for(source(), "controlnet", ())
