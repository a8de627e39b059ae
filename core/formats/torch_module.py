"""The torch_module kind: a folder with config.json, safetensors and, optionally, surgery.json.

It is a component's folder as diffusers and transformers write it: one safetensors file, its
fp16 variant, or shards with an index. surgery.json lists the operations to replay after loading.
Only these files belong to the artifact; whatever else lies in the folder is ignored.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffoundry.errors import ArtifactError, ModelError
from diffoundry.formats.canonical import canonical_json, inside, sha256_bytes, sha256_file
from diffoundry.formats.safetensors_file import TensorHeader, read_header

if TYPE_CHECKING:
    import torch

KIND = "torch_module"
CONFIG = "config.json"
SURGERY = "surgery.json"
BASE_NAMES = ("diffusion_pytorch_model", "model")
VARIANTS = ("", "fp16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (".msgpack", ".h5", ".onnx", ".gguf")
HOW_TO_CONVERT = (
    "load it once where you trust it and write it again: "
    "DiffusionPipeline.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError when it is missing or not a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            str(path), expected="a readable JSON file", found=error.strerror or str(error)
        ) from error
    except ValueError as error:
        raise ModelError(
            str(path),
            expected="valid JSON",
            found=str(error),
            remedy="get this file again from where the model came from",
        ) from error
    if not isinstance(data, dict):
        raise ModelError(str(path), expected="a JSON object", found=type(data).__name__)
    return data


def model_file(folder: Path, relative: str) -> Path:
    """`relative` inside `folder`; a link only as the hub's cache makes them (to its own blobs).

    Raises ModelError for a path that leads anywhere else.
    """
    path = folder / relative
    safe = PurePosixPath(relative)
    if path.is_symlink() and len(safe.parts) == 1 and "\\" not in relative:
        blobs = _hub_blobs(folder)
        if blobs is not None and path.resolve().parent == blobs:
            return path
    try:
        return inside(folder, relative)
    except ArtifactError as error:
        raise ModelError(
            error.where, expected=error.expected, found=error.found, remedy=error.remedy
        ) from error


def _hub_blobs(folder: Path) -> Path | None:
    """The blobs folder of the hub cache that `folder` is a snapshot in, if it is."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return (parent.parent.parent / "blobs").resolve()
    return None


def find_weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component: one file, or shards in the order of their names.

    The plain name is preferred to the fp16 variant, as diffusers does. Raises ModelError when
    there are none; weights that exist only as a pickle are refused, since reading one runs code.
    """
    return tuple(model_file(folder, name) for name in _weight_names(folder)[0])


def _weight_names(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weight files, and of the shard index where there is one."""
    for variant in VARIANTS:
        for base in BASE_NAMES:
            single = f"{base}.{variant}.safetensors" if variant else f"{base}.safetensors"
            if (folder / single).exists():
                return (single,), ()
            for index in _index_names(base, variant):
                if (folder / index).exists():
                    return _shards(folder, index), (index,)
    raise _no_weights(folder)


def _index_names(base: str, variant: str) -> tuple[str, ...]:
    if not variant:
        return (f"{base}.safetensors.index.json",)
    # Both orders are in use: diffusers has changed it.
    return (f"{base}.safetensors.index.{variant}.json", f"{base}.{variant}.safetensors.index.json")


def _shards(folder: Path, index: str) -> tuple[str, ...]:
    weight_map = read_json(model_file(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(str(folder / index), expected="a weight_map", found="none")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelError(
                str(folder / index), expected="shards in safetensors files", found=name
            )
        if not model_file(folder, name).is_file():
            raise ModelError(
                str(folder / index),
                expected=f"the shard {name}",
                found="no such file",
                remedy="copy or download the missing shard",
            )
    return tuple(names)


def _no_weights(folder: Path) -> ModelError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith((*OTHER_WEIGHTS, ".safetensors"))]
    expected = " or ".join(f"{base}.safetensors" for base in BASE_NAMES)
    if pickles:
        return ModelError(
            f"weights in {folder}",
            expected=f"safetensors ({expected})",
            found=f"only a pickle ({', '.join(pickles)}), which can run code when it is read",
            remedy=HOW_TO_CONVERT,
        )
    return ModelError(
        f"weights in {folder}",
        expected=f"{expected}, their .fp16 variant, or shards with an index",
        found=", ".join(others) or "no weights",
        remedy="write the model with save_pretrained(folder, safe_serialization=True)",
    )


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor's name, dtype and shape, from the headers alone (torch is not needed).

    Raises ModelError for a damaged file, a tensor that stands in two shards, and shards that do
    not hold what their index says.
    """
    weights, indexes = _weight_names(folder)
    tensors: dict[str, TensorHeader] = {}
    for name in weights:
        found = read_header(model_file(folder, name))
        double = sorted(tensors.keys() & found.keys())
        if double:
            raise ModelError(
                f"weights {folder / name}", found=f"{double[0]!r} stands in two shards"
            )
        tensors.update(found)
        for index in indexes:
            weight_map = read_json(model_file(folder, index))["weight_map"]
            listed = {tensor for tensor, file in weight_map.items() if file == name}
            if listed != found.keys():
                wrong = sorted(listed ^ found.keys())
                raise ModelError(
                    f"weights {folder / name}",
                    expected=f"the tensors that {index} lists for it",
                    found=f"{len(wrong)} that differ, the first is {wrong[0]!r}",
                    remedy="copy or download the shards and their index again",
                )
    return tensors


def files(folder: Path) -> tuple[Path, ...]:
    """The files that belong to the artifact, sorted by name; nothing else in the folder counts."""
    weights, indexes = _weight_names(folder)
    names = {CONFIG, *weights, *indexes}
    if (folder / SURGERY).exists():
        names.add(SURGERY)
    return tuple(model_file(folder, name) for name in sorted(names))


def validate(folder: Path) -> None:
    """Check everything that can be checked without torch: JSON, headers, operations' format.

    Raises ModelError.
    """
    from diffoundry.models.surgery import read_surgery

    read_json(model_file(folder, CONFIG))
    read_headers(folder)
    read_surgery(folder)


def digest(folder: Path) -> str:
    """Digest of names and contents of the files that belong to the artifact."""
    return sha256_bytes(canonical_json({path.name: sha256_file(path) for path in files(folder)}))


def size_bytes(folder: Path) -> int:
    """Bytes of the files that belong to the artifact."""
    return sum(path.stat().st_size for path in files(folder))


def load_model(folder: Path, component: str, dtype: str = "float32") -> torch.nn.Module:
    """The component as a module with flat inputs: see diffoundry.models.components."""
    from diffoundry.models.components import load_component

    return load_component(folder, component, dtype)
