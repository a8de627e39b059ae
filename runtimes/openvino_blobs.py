"""Compiled OpenVINO models kept in the user's cache folder, so that opening one again is quick.

OpenVINO's own CACHE_DIR finds a blob by path and time, and computes with a damaged one (tried:
flipped bytes gave NaN). Here a blob is found by the contents that it was made from, and sealed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffoundry.folders import cache_root
from diffoundry.formats import canonical, openvino

_SEAL_BYTES = hashlib.sha256().digest_size
# The weights stay in model.bin: a blob holds the compiled graph, about a twentieth of the model.
# Not tried on other devices: their blobs hold everything.
_WITHOUT_WEIGHTS = {"CPU": {"CACHE_MODE": "OPTIMIZE_SIZE"}}


def compile_or_load(
    core: Any, path: Path, device: str, options: Mapping[str, Any]
) -> tuple[Any, bool]:
    """The model in folder `path` compiled for `device`, and whether a kept blob was taken.

    A blob of other contents, another OpenVINO, device or options, and a damaged one, is made
    again. Raises ArtifactError for a damaged model, RuntimeError where OpenVINO refuses it.
    """
    openvino.validate(path)
    file = blob_file(core, path, device, options)
    settings = {**options, **_WITHOUT_WEIGHTS.get(device, {})}
    kept = _read(file)
    if kept is not None:
        weights = {"WEIGHTS_PATH": str(openvino.weights_file(path))}
        more = weights if device in _WITHOUT_WEIGHTS else {}
        try:
            return core.import_model(kept, device, {**settings, **more}), True
        except RuntimeError:
            pass  # another build of OpenVINO than its version says: made again below
    model = core.read_model(openvino.model_file(path), openvino.weights_file(path))
    compiled = core.compile_model(model, device, settings)
    _write(file, compiled)
    return compiled, False


def blob_file(core: Any, path: Path, device: str, options: Mapping[str, Any]) -> Path:
    """Where the blob of this model, on this device, with these options, is kept."""
    package = openvino.import_openvino()
    facts = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
    key = {
        "graph": canonical.sha256_file(openvino.model_file(path)),  # holds the weights' digest
        "openvino": str(package.__version__),
        "device": [device, *(str(core.get_property(device, name)) for name in facts)],
        "options": {name: str(value) for name, value in options.items()},
    }
    digest = canonical.sha256_bytes(canonical.canonical_json(key)).removeprefix("sha256:")
    return cache_root() / "openvino" / f"{digest}.blob"


def _read(file: Path) -> bytes | None:
    """The blob in `file`, or None where there is none or its seal does not fit."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    seal, blob = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
    return blob if hashlib.sha256(blob).digest() == seal else None


def _write(file: Path, compiled: Any) -> None:
    """Keep the compiled model. Without room or right to write, or on a device that exports
    nothing, the next time is as slow as this one."""
    try:
        exported = compiled.export_model()
        blob = exported if isinstance(exported, bytes) else exported.getvalue()
        file.parent.mkdir(parents=True, exist_ok=True)
        canonical.atomic_write(file, hashlib.sha256(blob).digest() + blob)
    except (OSError, RuntimeError):
        pass
