"""Reads metric weights that the user names: safetensors only, complete, or one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffoundry.errors import MissingToolError, ModelError
from diffoundry.formats.safetensors_file import read_header

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
DOCS = "docs/quality.md says which tensors, and how to write them from the usual files"


def check_safetensors(path: Path, where: str) -> None:
    """Refuse what is absent or is not a safetensors file. Raises ModelError.

    .bin, .pt and .pth hold pickles, which can run code when they are read.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        remedy = f"name the file with the weights; {DOCS}"
    elif path.suffix != SUFFIX:
        found = f"{path.suffix or 'no suffix'}: such a file may be a pickle, which can run code"
        remedy = f"write its tensors with safetensors.torch.save_file; {DOCS}"
    else:
        return
    raise ModelError(f"{where} {path}", expected=f"a {SUFFIX} file", found=found, remedy=remedy)


def load_tensors(
    path: Path, where: str, wanted: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> dict[str, torch.Tensor]:
    """The wanted tensors of a file as float32, by our names; others in the file are left alone.

    `wanted`: name -> (shape, names that the file may give it). Raises ModelError that lists every
    tensor which is missing or of another shape, or names one that is not finite.
    """
    import torch
    from safetensors import safe_open

    check_safetensors(path, where)
    header = read_header(path)
    chosen, problems = {}, []
    for name, (shape, spellings) in wanted.items():
        spelling = next((one for one in spellings if one in header), None)
        if spelling is None:
            problems.append(f"no {spellings[0]}")
        elif header[spelling].shape != shape:
            problems.append(f"{spelling} is {list(header[spelling].shape)}, not {list(shape)}")
        else:
            chosen[name] = spelling
    if problems:
        raise ModelError(
            f"{where} {path}",
            expected=f"{len(wanted)} tensors, among them {next(iter(wanted.values()))[1][0]}",
            found=f"{len(problems)} do not fit: {'; '.join(problems)}",
            remedy=DOCS,
        )
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name, spelling in chosen.items():
            value = file.get_tensor(spelling).float()
            if not bool(torch.isfinite(value).all()):
                raise ModelError(
                    f"{where} {path}",
                    expected="finite values",
                    found=f"NaN or infinity in {spelling}",
                    remedy="copy or convert the file again; it is damaged",
                )
            tensors[name] = value
    return tensors


def need_torch(what: str) -> None:
    """Raise MissingToolError, naming the extra, where torch or transformers is absent."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingToolError(
            what,
            expected="the packages torch and transformers",
            found=str(error),
            remedy="pip install 'diffoundry[build]'",
        ) from error
    del torch
