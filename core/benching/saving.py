"""Writes a bench into the bundle's evidence of this host, where `choose_variant` looks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffoundry.artifacts import disk
from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import VariantEvidence, new_evidence, update_evidence
from diffoundry.benching.result import Result, Row


def save_evidence(bundle: Bundle, result: Result) -> Path:
    """Merge the figures into evidence/<host>.json and return its path; the manifest stays.

    Raises UsageError or StageError where the disk is closed or full.
    """
    variants = {
        row.entry.name: VariantEvidence(
            bench=_record(row, result),
            prompt_accuracy=row.quality["prompt_accuracy"] if row.quality else None,
        )
        for row in result.variants
    }
    baselines = {row.entry.name: _record(row, result) for row in result.baselines}
    with disk.explained(f"evidence of the bundle {bundle.path}", bundle.path):
        return update_evidence(
            bundle.path, new_evidence(bundle.digest, variants, baselines=baselines)
        )


def _record(row: Row, result: Result) -> dict[str, Any]:
    return {**row.as_json(), "settings": result.settings(), "energy": result.energy}
