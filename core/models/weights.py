"""Putting a folder's safetensors into a network without holding them twice.

Import this module only where torch is wanted: it imports torch at its top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from diffoundry.errors import ModelError
from diffoundry.formats.safetensors_file import TensorHeader
from diffoundry.formats.torch_module import CONFIG, find_weights, read_headers

LISTED = 5
# In files of older or larger classes, unused by the network: transformers ignores them too.
UNUSED = (r"(.*\.)?position_ids", r"text_projection\.weight", r"logit_scale")
# AttentionBlock's names in autoencoders written before diffusers 0.15.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def fill(network: torch.nn.Module, folder: Path, dtype: torch.dtype, wanted: str = "") -> None:
    """Load the folder's weights into `network`, whose parameters are on the meta device.

    All names and shapes are compared with the files' headers; values are read only for the
    parameters whose names match the regular expression `wanted` (all by default), one at a time,
    each checked to be finite. Raises ModelError.
    """
    headers = read_headers(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    names = _file_names(headers, expected)
    _check_fit(folder, headers, names, expected)
    state = {}
    for path in find_weights(folder):
        # One mapping for all tensors of a file: each opening would map it again.
        with safe_open(path, framework="pt") as file:
            here = set(file.keys())
            for name, in_file in names.items():
                if in_file in here and re.match(wanted, name):
                    value = file.get_tensor(in_file).reshape(expected[name])
                    state[name] = _convert(path, in_file, value, dtype)
    network.load_state_dict(state, strict=False, assign=True)


def names_in_files(folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The network's name of each tensor in the folder's files -> its name there."""
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return _file_names(read_headers(folder), expected)


def _file_names(
    headers: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The network's name of each tensor in the files -> its name there."""
    names = {}
    for in_file in headers:
        if any(re.fullmatch(pattern, in_file) for pattern in UNUSED) and in_file not in expected:
            continue
        name = in_file
        if name not in expected:
            # transformers 5 has no "text_model." level any more; files keep it.
            name = name.removeprefix("text_model.")
        if name not in expected:
            name = re.sub(
                r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
                lambda match: f"{match[1]}{OLD_ATTENTION[match[2]]}.",
                name,
            )
        names[name if name in expected else in_file] = in_file
    return names


def _check_fit(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ModelError that sums up every name and shape in which config and weights differ."""
    missing = sorted(expected.keys() - names.keys())
    unknown = sorted(names.keys() - expected.keys())
    shapes = [
        f"{name} is {list(headers[in_file].shape)}, not {list(expected[name])}"
        for name, in_file in sorted(names.items())
        if name in expected and not _same_shape(headers[in_file].shape, expected[name])
    ]
    kinds = [
        f"{name} has dtype {headers[in_file].dtype}"
        for name, in_file in sorted(names.items())
        if headers[in_file].dtype not in ("F64", "F32", "F16", "BF16")
    ]
    problems = [
        _summary(f"{len(found)} {label}", found)
        for label, found in (
            ("missing", missing),
            ("not in the config's network", unknown),
            ("of another shape", shapes),
            ("not floating point", kinds),
        )
        if found
    ]
    if problems:
        raise ModelError(
            f"weights in {folder}",
            expected=f"the {len(expected)} tensors of the network that {CONFIG} describes",
            found="; ".join(problems),
            remedy=f"{CONFIG} and weights come from different models: get both from one place",
        )


def _same_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    # Linear layers of old attention blocks are stored as 1x1 convolutions in some files.
    return found == expected or (len(expected) == 2 and found == (*expected, 1, 1))


def _summary(label: str, items: list[str]) -> str:
    more = f", and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return f"{label} ({', '.join(items[:LISTED])}{more})"


def _convert(path: Path, name: str, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One tensor in `dtype`, still the mapped one where the file has that dtype."""
    value = stored.to(dtype)
    if _is_finite(value):
        return value
    bad = int((~torch.isfinite(stored)).sum())
    if bad:
        raise ModelError(
            f"weights {path}",
            expected="finite values",
            found=f"{bad} NaN or infinite of {stored.numel()} in {name}",
            remedy="the model is damaged; get it again from where it came from",
        )
    raise ModelError(
        f"weights {path}",
        expected=f"values that {dtype} can hold (up to {torch.finfo(dtype).max:g})",
        found=f"{float(stored.abs().max()):g} in {name}",
        remedy="keep this component in float32",
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    # Minimum and maximum carry NaN along, and need no copy of the tensor as torch.isfinite does.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
