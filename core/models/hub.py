"""Fetching a pipeline from the Hugging Face hub at a pinned revision."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from diffoundry.errors import MissingToolError, ModelError
from diffoundry.formats.torch_module import HOW_TO_CONVERT, PICKLES

NETWORKS = ("text_encoder", "unet", "vae")
# Configs and tokenizer files; weights are chosen one by one. Never a pickle, never code.
TEXT_FILES = (
    "model_index.json",
    *(
        f"{part}/*.{end}"
        for part in (*NETWORKS, "scheduler", "tokenizer")
        for end in ("json", "txt")
    ),
)


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name (a name alone is not accepted)."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    return re.fullmatch(f"{part}/{part}", model) is not None


def fetch(model: str, revision: str | None) -> tuple[Path, str]:
    """Download a snapshot (or find it in the hub's cache); return its folder and commit hash.

    A branch, tag or missing revision is resolved to the full commit hash first, so that what was
    read has a name. Without a network, a full hash is looked for in the cache. Raises ModelError.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingToolError(
            f"model {model}",
            expected="the package huggingface_hub, to read models from the hub",
            found="not installed",
            remedy="pip install 'diffoundry[build]', or pass a directory",
        ) from error
    # The first base is the transport library's own error, which is no OSError.
    unreachable = (*HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        info = HfApi().model_info(model, revision=revision)
        commit, names = str(info.sha), [file.rfilename for file in info.siblings or ()]
    except unreachable as error:
        if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
            raise _unreachable(model, error) from error
        commit, names = revision, []
    wanted = choose_files(model, names) if names else None
    try:
        folder = snapshot_download(
            model, revision=commit, allow_patterns=wanted, local_files_only=wanted is None
        )
    except unreachable as error:
        raise _unreachable(model, error) from error
    return Path(folder), commit


def choose_files(model: str, names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that a pipeline needs: text files, and one set of weights.

    The fp16 variant is taken only where a part has no plain weights. Raises ModelError where a
    part has only pickles.
    """
    listed = sorted(names)
    chosen = [name for name in listed if any(fnmatch.fnmatch(name, text) for text in TEXT_FILES)]
    for part in NETWORKS:
        inside = [name for name in listed if name.rpartition("/")[0] == part]
        weights = [name for name in inside if name.endswith(".safetensors")]
        plain = [name for name in weights if re.search(r"/[a-z_]+(-\d+-of-\d+)?\.safet", name)]
        half = [name for name in weights if ".fp16." in name or ".fp16-" in name]
        if not (plain or half) and any(name.endswith(PICKLES) for name in inside):
            raise ModelError(
                f"{part} of {model}",
                expected="weights as safetensors",
                found="only a pickle, which can run code when it is read",
                remedy=HOW_TO_CONVERT,
            )
        chosen += plain or half
    return chosen


def _unreachable(model: str, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"model {model}",
        expected="a directory of this name, or a model on the Hugging Face hub",
        found=f"no such directory, and the hub does not give it ({lines[0][:200]})",
        remedy="check the name and the network, or pass a directory that was downloaded before",
    )
