"""Opening a diffusers pipeline: what it is, checked, without torch and without running its code.

`open_pipeline` reads model_index.json, the configs and the headers of the weights. Values are
read only by `components.load_component`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.errors import ModelError
from diffoundry.formats import torch_module
from diffoundry.models.defaults import field
from diffoundry.models.geometry import Geometry, read_geometry

SUPPORTED_PIPELINES = ("LatentConsistencyModelPipeline", "StableDiffusionPipeline")
INDEX = "model_index.json"
# Part of the index -> the classes that it may have, with their library.
CLASSES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "text_encoder": (("transformers", "CLIPTextModel"),),
    "tokenizer": (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")),
    "unet": (("diffusers", "UNet2DConditionModel"),),
    "vae": (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny")),
}
LEFT_OUT = ("feature_extractor", "image_encoder", "safety_checker")
NETWORKS = ("text_encoder", "unet", "vae")
LIBRARIES = ("diffusers", "transformers")
COMPONENTS: Mapping[str, str] = {
    "text_encoder": "text_encoder",
    "unet": "unet",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
}
"""Component -> the folder of the pipeline that it comes from."""

PREVIEW = "preview_decoder"
"""The component that a build may have besides (`models.preview`): a small decoder."""


@dataclass(frozen=True)
class ComponentSource:
    """Where one component's config and weights lie; vae_encoder and vae_decoder share a folder."""

    name: str
    folder: Path
    class_name: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]


@dataclass(frozen=True)
class PipelineSource:
    """A diffusers directory that was checked as far as that goes without torch.

    `scheduler` is scheduler_config.json with `_class_name` set to what model_index.json names.
    `left_out` names the parts that are in the pipeline and will not be built. `revision` is the
    full commit hash where the model came from the hub.
    """

    path: Path
    pipeline_class: str
    components: Mapping[str, ComponentSource]
    scheduler: Mapping[str, Any]
    tokenizer_path: Path
    geometry: Geometry
    left_out: tuple[str, ...]
    revision: str | None = None
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """What people call the model: its hub id, else its folder's name."""
        return self.hub_id or self.path.resolve().name


def open_pipeline(model: str | Path, revision: str | None = None) -> PipelineSource:
    """Open a diffusers directory, or a hub id ("owner/name") where a network exists.

    Raises ModelError for everything that is wrong with it.
    """
    from diffoundry.models.hub import fetch, is_hub_id

    path = Path(model).expanduser()
    if not path.exists() and isinstance(model, str) and is_hub_id(model):
        path, revision = fetch(model, revision)
        return dataclasses.replace(_open_directory(path, revision), hub_id=model)
    if revision is not None:
        raise ModelError(
            f"model {model}",
            expected="a hub id, which has revisions",
            found="a path" if path.exists() else "neither a hub id nor a directory",
            remedy="leave the revision out",
        )
    return _open_directory(path, revision)


def _open_directory(path: Path, revision: str | None) -> PipelineSource:
    index = _read_index(path)
    pipeline_class = _pipeline_class(path, index)
    _check_parts(path, index)
    configs = {
        name: _component_config(path, name, index) for name in ("text_encoder", "unet", "vae")
    }
    scheduler = _scheduler(path, index)
    tokenizer_path = path / "tokenizer"
    tokenizer_config = _tokenizer_config(tokenizer_path)
    geometry = read_geometry(
        pipeline_class=pipeline_class,
        unet=configs["unet"],
        vae=configs["vae"],
        text_encoder=configs["text_encoder"],
        scheduler=scheduler,
        tokenizer=tokenizer_config,
    )
    _check_vocabulary(tokenizer_path, geometry.tokens, configs["text_encoder"])
    for part in NETWORKS:
        torch_module.validate(path / part)
    components = {
        name: ComponentSource(
            name=name,
            folder=path / part,
            class_name=index[part][1],
            config=configs[part],
            weights=torch_module.find_weights(path / part),
        )
        for name, part in COMPONENTS.items()
    }
    left_out = tuple(name for name in LEFT_OUT if _is_present(index.get(name)))
    return PipelineSource(
        path=path,
        pipeline_class=pipeline_class,
        components=components,
        scheduler=scheduler,
        tokenizer_path=tokenizer_path,
        geometry=geometry,
        left_out=left_out,
        revision=revision,
    )


def _read_index(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(
            f"model {path}",
            expected="a diffusers directory or a hub id (owner/name)",
            found="no such directory",
            remedy="check the path; without a network a hub id cannot be used",
        )
    if not path.is_dir() or not (path / INDEX).exists():
        single = path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.ckpt"))
        raise ModelError(
            f"model {path}",
            expected=f"a diffusers directory: {INDEX} and one folder per component",
            found="a file" if path.is_file() else f"a directory without {INDEX}",
            remedy=(
                "convert a single checkpoint file with diffusers' from_single_file(...) and "
                "save_pretrained(folder, safe_serialization=True)"
                if single
                else "pass the folder that save_pretrained wrote"
            ),
        )
    return torch_module.read_json(torch_module.model_file(path, INDEX))


def _pipeline_class(path: Path, index: Mapping[str, Any]) -> str:
    name = index.get("_class_name")
    if isinstance(name, list):
        raise _custom_code(path, "the pipeline", ".".join(str(part) for part in name))
    if name not in SUPPORTED_PIPELINES:
        raise ModelError(
            str(path / INDEX),
            expected=" or ".join(SUPPORTED_PIPELINES),
            found=f"{name}, which is not supported" if name else "no _class_name",
            remedy="use a pipeline of a supported class",
        )
    return str(name)


def _is_present(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _check_parts(path: Path, index: Mapping[str, Any]) -> None:
    """Every part must be known, of a supported class, and come from a library, not from code."""
    for name, entry in index.items():
        if name.startswith("_") or name in LEFT_OUT or not isinstance(entry, list):
            continue
        if not _is_present(entry):
            continue
        if entry[0] not in LIBRARIES:
            raise _custom_code(path, name, f"{entry[0]}.{entry[1]}")
        if name not in (*CLASSES, "scheduler"):
            raise ModelError(
                str(path / INDEX),
                expected=f"the parts {', '.join((*CLASSES, 'scheduler', *LEFT_OUT))}",
                found=f"{name} ({entry[1]})",
                remedy="this part is not supported; remove it or use another pipeline",
            )
    for name, classes in CLASSES.items():
        entry = index.get(name)
        if not _is_present(entry):
            raise ModelError(str(path / INDEX), expected=f"a {name}", found="none")
        if tuple(entry) not in classes:  # type: ignore[arg-type]
            raise ModelError(
                str(path / INDEX),
                expected=f"{name} of class {' or '.join(known for _, known in classes)}",
                found=str(entry[1]),  # type: ignore[index]
                remedy="use a pipeline whose parts have supported classes",
            )
    if not _is_present(index.get("scheduler")):
        raise ModelError(str(path / INDEX), expected="a scheduler", found="none")


def _custom_code(path: Path, part: str, found: str) -> ModelError:
    return ModelError(
        f"{part} of {path}",
        expected=f"a class of {' or '.join(LIBRARIES)}",
        found=f"{found}, which would run code from the model",
        remedy="code from a model is never run; use a pipeline of library classes",
    )


def read_config(path: Path, part: str, name: str) -> dict[str, Any]:
    """The JSON file `name` in the folder `part` of `path`. Raises ModelError, also where it names
    code to be run."""
    if not (path / part).is_dir():
        raise ModelError(
            f"{part} of {path}",
            expected=f"a folder {part}",
            found="no such folder",
            remedy="copy or download the whole pipeline",
        )
    config = torch_module.read_json(torch_module.model_file(path / part, name))
    for key in ("auto_map", "trust_remote_code", "custom_pipelines"):
        if config.get(key):
            raise _custom_code(path, part, f"{key} in {name}")
    return config


def _component_config(path: Path, part: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a network with `_class_name` set, whichever library wrote it."""
    config = read_config(path, part, torch_module.CONFIG)
    declared = index[part][1]
    stated = config.get("_class_name") or (config.get("architectures") or [declared])[0]
    if stated != declared:
        raise ModelError(
            str(path / part / torch_module.CONFIG),
            expected=f"{declared}, as {INDEX} says",
            found=str(stated),
            remedy="the folder belongs to another model",
        )
    return {**config, "_class_name": declared}


def _scheduler(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    config = read_config(path, "scheduler", "scheduler_config.json")
    return {**config, "_class_name": index["scheduler"][1]}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """The tokenizer's config (empty where there is none); the vocabulary must be there."""
    slow = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    if not slow and not (folder / "tokenizer.json").exists():
        raise ModelError(
            f"tokenizer {folder}",
            expected="vocab.json and merges.txt, or tokenizer.json",
            found="neither",
            remedy="copy or download the whole pipeline",
        )
    if not (folder / "tokenizer_config.json").exists():
        return {}
    return read_config(folder.parent, folder.name, "tokenizer_config.json")


def _check_vocabulary(folder: Path, tokens: int, text_encoder: Mapping[str, Any]) -> None:
    """The tokenizer must open, and give no id that the text encoder has no embedding for."""
    from diffoundry.models.tokenizer import Tokenizer

    largest = Tokenizer.open(folder, tokens).largest_id
    size = int(field("CLIPTextModel", text_encoder, "vocab_size"))
    if largest >= size:
        raise ModelError(
            f"tokenizer {folder}",
            expected=f"ids below {size}, the text encoder's vocab_size",
            found=f"the id {largest}",
            remedy="the tokenizer and the text encoder come from different models",
        )
