"""The defaults that are repeated equal those of the classes."""

import inspect

import pytest

from diffoundry.models.defaults import DEFAULTS, field


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_class(name):
    import diffusers
    from transformers import CLIPTextConfig

    if name == "CLIPTextModel":
        config = CLIPTextConfig()
        found = {field: getattr(config, field) for field in DEFAULTS[name]}
    else:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        found = {field: parameters[field].default for field in DEFAULTS[name]}
    assert found == DEFAULTS[name]


def test_a_value_in_the_config_goes_first_even_when_it_is_none():
    assert field("AutoencoderKL", {"scaling_factor": 0.5}, "scaling_factor") == 0.5
    assert field("UNet2DConditionModel", {"mid_block_type": None}, "mid_block_type") is None
