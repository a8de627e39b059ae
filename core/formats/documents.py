"""Reading JSON documents that say which schema they follow."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError


@contextlib.contextmanager
def reading(what: str, path: Path, schema: str) -> Iterator[dict[str, Any]]:
    """The JSON object in `path`, for the `with` to take apart.

    Raises ArtifactError about `what` where the file cannot be read, is no such object, follows
    another schema, or where what the `with` does shows that a part is missing or of the wrong type.
    """
    from pydantic import ValidationError
    from safetensors import SafetensorError

    def damaged(found: str) -> ArtifactError:
        return ArtifactError(
            f"{what} {path}", expected=schema, found=found, remedy="run the build again"
        )

    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("schema") != schema:
            raise damaged("another kind of document, or another version")
        yield document
    except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise damaged(f"{type(error).__name__}: {error}") from error
