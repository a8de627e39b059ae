"""Every component equals the call that diffusers' own pipeline makes, at several shapes."""

import json
import warnings

import numpy as np
import pytest
import torch

from diffoundry.errors import ModelError
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import COMPONENTS, open_pipeline
from tests.mini_pipelines import PIPELINES, make_named


@pytest.fixture(scope="module", params=PIPELINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return make_named(tmp_path_factory.mktemp("pipelines") / name, name)


@pytest.fixture(scope="module")
def source(folder):
    return open_pipeline(folder)


@pytest.fixture(scope="module")
def reference(name, folder):
    """The same pipeline as diffusers loads it, upcast to float32."""
    import diffusers

    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    variant = PIPELINES[name].get("variant")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, kind).from_pretrained(
            folder,
            safety_checker=None,
            feature_extractor=None,
            variant=variant,
            torch_dtype=torch.float32,
            local_files_only=True,
        )


def shapes(source):
    """Native, and a batch of two with another height than width."""
    multiple = source.geometry.pixel_multiple_of
    native = {axis.name: axis.opt for axis in native_axes(source, {})}
    return [native, {"batch": 2, "height": 2 * multiple, "width": multiple}]


def feeds_for(contract, shape, largest_id=500):
    generator = torch.Generator().manual_seed(1)
    feeds = []
    for spec in contract.inputs:
        size = spec.shape(shape)
        if spec.dtype == "int64":
            feeds.append(torch.randint(0, largest_id, size, generator=generator))
        elif spec.name == "timestep":
            feeds.append(torch.linspace(999, 499, size[0]))
        else:
            feeds.append(torch.randn(size, generator=generator))
    return feeds


def reference_call(reference, component, feeds):
    """What the pipeline class computes for this component, in the contract's order."""
    vae = reference.vae
    if component == "text_encoder":
        return (reference.text_encoder(feeds[0], attention_mask=None)[0],)
    if component == "unet":
        condition = feeds[3] if len(feeds) > 3 else None
        return reference.unet(
            feeds[0],
            feeds[1],
            encoder_hidden_states=feeds[2],
            timestep_cond=condition,
            return_dict=False,
        )
    if component == "vae_decoder":
        return (vae.decode(feeds[0], return_dict=False)[0],)
    encoded = vae.encode(feeds[0])
    if hasattr(encoded, "latents"):
        return (encoded.latents,)
    return encoded.latent_dist.mean, encoded.latent_dist.std


@pytest.mark.parametrize("component", COMPONENTS)
def test_equals_the_pipelines_own_call_and_fits_the_contract(source, reference, component):
    contract = contract_for(source, component, native_axes(source, {}))
    module = load_component(source.components[component].folder, component)
    for shape in shapes(source):
        feeds = feeds_for(contract, shape)
        with torch.no_grad():
            outputs = module(*feeds)
            expected = reference_call(reference, component, feeds)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert len(outputs) == len(expected) == len(contract.outputs)
        for spec, output, wanted in zip(contract.outputs, outputs, expected, strict=True):
            assert tuple(output.shape) == spec.shape(shape), spec
            assert str(output.numpy().dtype) == spec.dtype
            # Not bit for bit: kernels differ with the alignment of the mapped weights.
            assert (output - wanted).abs().max() <= 2e-5 * wanted.abs().max(), spec


def test_every_input_of_the_unet_has_an_influence(source):
    contract = contract_for(source, "unet", native_axes(source, {}))
    module = load_component(source.components["unet"].folder, "unet")
    shape = contract.opt_shape()
    feeds = feeds_for(contract, shape)
    output = module(*feeds)
    for position, spec in enumerate(contract.inputs):
        swapped = list(feeds)
        swapped[position] = (
            torch.flip(feeds[position], [-1])
            if spec.name != "timestep"
            else (feeds[position] - 300)
        )
        change = (module(*swapped) - output).square().mean().sqrt() / output.std()
        assert change > 0.02, spec


@pytest.mark.parametrize("component", COMPONENTS)
def test_nothing_is_left_on_the_meta_device_and_nothing_trains(source, component):
    module = load_component(source.components[component].folder, component)
    tensors = [*module.parameters(), *module.buffers()]
    assert tensors
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert not module.training


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_computes_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    source = open_pipeline(make_named(tmp_path, "lcm"))
    for component in ("text_encoder", "vae_decoder"):
        module = load_component(source.components[component].folder, component, dtype)
        contract = contract_for(source, component, native_axes(source, {}))
        feeds = feeds_for(contract, contract.opt_shape())
        wide = load_component(source.components[component].folder, component)(*feeds)
        cast = [f.to(getattr(torch, dtype)) if f.is_floating_point() else f for f in feeds]
        output = module(*cast)
        assert output.dtype == getattr(torch, dtype)
        error = float((output.double() - wide.double()).abs().max())
        assert 0 < error < (1e-5 if dtype == "float64" else 2e-2)


def test_a_text_encoder_with_an_attention_mask_takes_it(tmp_path):
    from transformers import CLIPTextModel

    folder = make_named(tmp_path, "sd")
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": True}))
    source = open_pipeline(folder)
    contract = contract_for(source, "text_encoder", native_axes(source, {}))
    assert [spec.name for spec in contract.inputs] == ["input_ids", "attention_mask"]
    ids = torch.arange(12).reshape(1, 12)
    mask = torch.tensor([[1] * 5 + [0] * 7])
    module = load_component(folder / "text_encoder", "text_encoder")
    original = CLIPTextModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        expected = original(ids, attention_mask=mask)[0]
    assert torch.allclose(module(ids, mask), expected, atol=1e-5)
    assert not torch.equal(module(ids, torch.ones_like(mask)), expected)


def test_the_standard_deviation_is_clamped_as_diffusers_does(tmp_path):
    folder = make_named(tmp_path, "sd")
    module = load_component(folder / "vae", "vae_encoder")
    with torch.no_grad():
        module.quant_conv.bias[4:] = 1e4
    _, deviation = module(torch.zeros(1, 3, 16, 16))
    assert np.allclose(deviation.numpy(), np.exp(10.0))


@pytest.mark.parametrize("values", [("vae", "float32"), ("unet", "int8")])
def test_refuses_an_unknown_component_or_dtype(tmp_path, values):
    with pytest.raises(ModelError) as caught:
        load_component(tmp_path, *values)
    assert values[0] in caught.value.text() or values[1] in caught.value.text()


def test_refuses_the_folder_of_another_component(tmp_path):
    folder = make_named(tmp_path, "sd")
    with pytest.raises(ModelError, match="AutoencoderKL"):
        load_component(folder / "vae", "unet")


def test_settings_that_the_class_refuses_are_the_models_fault(tmp_path):
    folder = make_named(tmp_path, "sd")
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_num_groups": 7}))
    with pytest.raises(ModelError) as caught:
        load_component(folder / "unet", "unet")
    assert "unet/config.json" in caught.value.text()
