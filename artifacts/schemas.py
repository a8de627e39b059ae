"""The JSON Schemas of manifest and evidence: `python -m diffoundry.artifacts.schemas docs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffoundry.artifacts.evidence import SCHEMA as EVIDENCE_SCHEMA, Evidence
from diffoundry.artifacts.manifest import SCHEMA as MANIFEST_SCHEMA, Manifest, Record

FILES: dict[str, tuple[type[Record], str]] = {
    "manifest.schema.json": (Manifest, MANIFEST_SCHEMA),
    "evidence.schema.json": (Evidence, EVIDENCE_SCHEMA),
}


def schema_texts() -> dict[str, str]:
    """File name -> JSON Schema (draft 2020-12) of the documents that we write."""
    texts = {}
    for name, (model, version) in FILES.items():
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **model.model_json_schema(by_alias=True, mode="serialization"),
            "title": version,
        }
        texts[name] = json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return texts


def write_schemas(folder: Path) -> None:
    """Write both files into `folder`."""
    for name, text in schema_texts().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
