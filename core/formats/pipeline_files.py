"""The `pipeline_files` kind: a diffusers directory without its weights.

model_index.json, the scheduler's and tokenizer's files and the components' configs: everything
that decides how the components are called, and nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffoundry.formats.canonical import canonical_json, files_under, sha256_bytes, sha256_file


def files(path: Path) -> Iterator[Path]:
    """The files that count, in a fixed order."""
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if folder.name in ("tokenizer", "scheduler"):
            yield from files_under(folder)
        elif (folder / "config.json").is_file():
            yield folder / "config.json"
    yield path / "model_index.json"


def digest(path: Path) -> str:
    """Digest of those files' relative names and contents."""
    return sha256_bytes(
        canonical_json({f.relative_to(path).as_posix(): sha256_file(f) for f in files(path)})
    )


def size_bytes(path: Path) -> int:
    """Bytes of those files together."""
    return sum(file.stat().st_size for file in files(path))
