"""Building a component from its folder: a torch module that takes and gives flat tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.errors import MissingToolError, ModelError
from diffoundry.formats.torch_module import CONFIG, model_file, read_json
from diffoundry.models.defaults import field
from diffoundry.models.surgery import read_surgery

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16", "float64")
# The parameters that each half of an autoencoder uses.
HALVES: Mapping[str, str] = {
    "vae_encoder": r"(encoder|quant_conv)\.",
    "vae_decoder": r"(decoder|post_quant_conv)\.",
    "preview_decoder": r"decoder\.",
}
CLASSES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae_encoder": ("AutoencoderKL", "AutoencoderTiny"),
    "vae_decoder": ("AutoencoderKL", "AutoencoderTiny"),
    "preview_decoder": ("AutoencoderTiny",),
}


def load_component(folder: Path, component: str, dtype: str = "float32") -> torch.nn.Module:
    """Build `component` from a folder of config.json and safetensors, and replay surgery.json.

    The module is in eval mode without gradients. `forward` takes the contract's inputs in order
    and returns one tensor, or a tuple in the order of the contract's outputs. Floating inputs
    have the module's dtype (`timestep` may be float32). Weights are memory-mapped where the file
    has the asked dtype, else converted one tensor at a time. Raises ModelError where config and
    weights differ or a weight is not finite, MissingToolError without torch.
    """
    if component not in CLASSES:
        raise ModelError(
            f"component {component!r}",
            expected=f"one of {', '.join(CLASSES)}",
            found=component,
        )
    if dtype not in DTYPES:
        raise ModelError(
            f"dtype of {component}", expected=f"one of {', '.join(DTYPES)}", found=dtype
        )
    torch = _import_torch(component)
    from diffoundry.models import weights

    config = read_json(model_file(folder, CONFIG))
    class_name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if class_name not in CLASSES[component]:
        raise ModelError(
            str(folder / CONFIG),
            expected=f"{component} of class {' or '.join(CLASSES[component])}",
            found=str(class_name),
        )
    network = _build_on_meta(folder, str(class_name), config)
    operations = read_surgery(folder)
    for operation in operations:
        operation.resize(network)
    # An operation may look at the whole network; without one, half an autoencoder is enough.
    wanted = "" if operations else HALVES.get(component, "")
    weights.fill(network, folder, getattr(torch, dtype), wanted)
    for operation in operations:
        operation.apply(network, folder)
    module = _wrap(component, str(class_name), config, network)
    module.eval().requires_grad_(False)
    return module


def _import_torch(component: str) -> Any:
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingToolError(
            f"loading {component}",
            expected="torch, diffusers, transformers and accelerate",
            found=f"no {error.name}",
            remedy="pip install 'diffoundry[build]'",
        ) from error
    return torch


def _build_on_meta(folder: Path, class_name: str, config: Mapping[str, Any]) -> Any:
    """The network with its buffers, and with parameters that have shapes but no memory."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            if class_name == "CLIPTextModel":
                settings = transformers.CLIPTextConfig.from_dict(dict(config))
                # Fused attention: exports to one operation, and computes in the network's dtype
                # (eager attention has its softmax in float32 even for a float64 reference).
                settings._attn_implementation = "sdpa"
                return transformers.CLIPTextModel(settings)
            kind = getattr(diffusers, class_name)
            known = inspect.signature(kind.__init__).parameters
            return kind(**{name: value for name, value in config.items() if name in known})
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            str(folder / CONFIG),
            expected=f"settings that {class_name} accepts",
            found=str(error),
            remedy="the config is damaged, or from another version of diffusers",
        ) from error


def _wrap(
    component: str, class_name: str, config: Mapping[str, Any], network: Any
) -> torch.nn.Module:
    from diffoundry.models import wrappers

    if component == "text_encoder":
        masked = bool(config.get("use_attention_mask", False))
        return (wrappers.MaskedTextEncoder if masked else wrappers.TextEncoder)(network)
    if component == "unet":
        guided = config.get("time_cond_proj_dim") is not None
        return (wrappers.GuidedDenoiser if guided else wrappers.Denoiser)(network)
    if component == "preview_decoder":
        scaling = float(field(class_name, config, "scaling_factor"))
        return wrappers.PreviewDecoder(network, scaling)
    tiny = class_name == "AutoencoderTiny"
    if component == "vae_encoder":
        return (wrappers.TinyEncoder if tiny else wrappers.GaussianEncoder)(network)
    return (wrappers.TinyDecoder if tiny else wrappers.GaussianDecoder)(network)
