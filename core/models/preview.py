"""A small decoder beside a pipeline's own: an AutoencoderTiny whose pictures are previews."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from diffoundry.errors import ModelError
from diffoundry.formats import torch_module
from diffoundry.models.defaults import field
from diffoundry.models.geometry import Geometry, read_vae
from diffoundry.models.pipeline import INDEX, PREVIEW, ComponentSource, PipelineSource, read_config

CLASS = "AutoencoderTiny"
WANTED = f"the diffusers folder of an {CLASS}, or of a pipeline whose vae is one"


def with_preview_decoder(source: PipelineSource, path: Path) -> PipelineSource:
    """`source` with a further component: the decoder of the AutoencoderTiny in the folder `path`.

    `path` holds config.json and safetensors, or is a pipeline's folder, whose vae is then taken.
    Reads the config and the headers of the weights, no value. Raises ModelError for anything but
    such a folder, and for a decoder of other latents than the pipeline's.
    """
    folder = _folder_of(path)
    config = read_config(folder.parent, folder.name, torch_module.CONFIG)
    if config.get("_class_name") != CLASS:
        found = config.get("_class_name") or (config.get("architectures") or ["no class"])[0]
        raise _refused(folder / torch_module.CONFIG, CLASS, str(found))
    _check_latents(source.geometry, config, str(folder / torch_module.CONFIG))
    torch_module.validate(folder)
    weights = torch_module.find_weights(folder)
    preview = ComponentSource(PREVIEW, folder, CLASS, config, weights)
    return dataclasses.replace(source, components={**source.components, PREVIEW: preview})


def _folder_of(path: Path) -> Path:
    """The autoencoder's own folder."""
    path = Path(os.path.abspath(path.expanduser()))
    if not path.is_dir():
        raise _refused(path, WANTED, "a file" if path.exists() else "no such folder")
    if (path / INDEX).exists():
        entry = torch_module.read_json(torch_module.model_file(path, INDEX)).get("vae")
        if entry != ["diffusers", CLASS]:
            vae = entry[-1] if isinstance(entry, list) and entry and entry[-1] else "no vae"
            raise _refused(path / INDEX, f"a vae of the class {CLASS}", str(vae))
        return path / "vae"
    if not (path / torch_module.CONFIG).exists():
        raise _refused(path, WANTED, f"neither {torch_module.CONFIG} nor {INDEX}")
    return path


def _check_latents(geometry: Geometry, config: dict[str, Any], where: str) -> None:
    factor, _, _ = read_vae(CLASS, config, where)
    channels = int(field(CLASS, config, "latent_channels"))
    if (channels, factor) != (geometry.latent_channels, geometry.vae_factor):
        raise ModelError(
            f"--preview-vae: {where}",
            expected=f"a decoder of the model's latents: {geometry.latent_channels} channels, "
            f"{geometry.vae_factor} pixels a side each",
            found=f"{channels} channels, {factor} pixels a side",
            remedy="take one that was made for this kind of model",
        )


def _refused(where: Path, expected: str, found: str) -> ModelError:
    return ModelError(
        f"--preview-vae: {where}",
        expected=expected,
        found=found,
        remedy="name the folder that AutoencoderTiny.save_pretrained wrote, on this machine",
    )
