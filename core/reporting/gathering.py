"""Everything that the report shows, gathered once: for the page, and as a JSON document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.artifacts.bundle import Bundle, open_bundle
from diffoundry.artifacts.compression import read_compression
from diffoundry.artifacts.evidence import Evidence
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.errors import BundleError
from diffoundry.parity.table import COLUMNS, rows
from diffoundry.reporting.attributes import Score, readings, score_attributes
from diffoundry.reporting.pictures import Pair, Pictures, make_pictures
from diffoundry.reporting.verdict import Verdict, judge, read_all

SCHEMA = "diffoundry.report/1.0"


@dataclass(frozen=True)
class Report:
    """A bundle with its evidence, its pictures as the engines here make them, and the verdict.

    `scores` is attribute -> who -> score, empty where the model has no recogniser.
    """

    bundle: Bundle
    evidence: tuple[Evidence, ...]
    evidence_notes: tuple[str, ...]
    verdict: Verdict
    pictures: Pictures
    scores: dict[str, dict[str, Score]]


def gather(
    path: Path, hashes: HashCache | None = None, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Open the bundle, check its files, run its engines on the recorded noise.

    Raises UsageError where there is no such folder, and BundleError for a bundle that is not
    whole: a page about it would be believed.
    """
    bundle = open_bundle(path, hashes)
    problems = bundle.verify_files(rehash=hashes is None)
    if problems:
        raise BundleError(
            f"bundle {bundle.path}",
            expected="the files that its manifest lists",
            found="; ".join(problems[:5]),
            remedy="do not use this bundle; get it again from whoever made it",
        )
    evidence, notes = read_all(bundle)
    pictures = make_pictures(bundle, say)
    return Report(
        bundle, evidence, notes, judge(bundle, evidence), pictures, score_attributes(pictures)
    )


def as_document(report: Report) -> dict[str, Any]:
    """The data of the page, pictures as their figures."""
    manifest = report.bundle.manifest
    return {
        "schema": SCHEMA,
        "model": manifest.model.model_dump(mode="json"),
        "profile": manifest.profile,
        "manifest_digest": report.bundle.digest,
        "verdict": {
            "status": report.verdict.status,
            "sentence": report.verdict.sentence,
            "variants": report.verdict.variants,
        },
        "pictures": [_pair(pair, report.pictures) for pair in report.pictures.pairs],
        "not_run_here": dict(report.pictures.absent),
        "run_by_a_stand_in": dict(report.pictures.lent),
        "attributes": {
            name: {
                who: {"hits": one.hits, "count": one.count, "accuracy": one.accuracy}
                for who, one in found.items()
            }
            for name, found in report.scores.items()
        },
        "parity": [
            {
                "host": one.host.name,
                "variant": name,
                "rows": [dict(zip(COLUMNS, cells, strict=True)) for cells in rows(variant.results)],
            }
            for one in report.evidence
            for name, variant in one.variants.items()
        ],
        "size_bytes": {
            variant.name: {name: engine.size_bytes for name, engine in variant.engines.items()}
            for variant in manifest.variants
        },
        "compression": {
            variant.name: {
                name: one.as_json()
                for name, one in read_compression(report.bundle, variant).items()
            }
            for variant in manifest.variants
            if variant.compression
        },
        "lineage": {
            variant.name: {name: list(engine.lineage) for name, engine in variant.engines.items()}
            for variant in manifest.variants
        },
        "left_out": list(manifest.model.left_out),
        "notes": [*manifest.notes, *report.evidence_notes],
        "tools": dict(manifest.tools),
        "evidence": [one.model_dump(mode="json", by_alias=True) for one in report.evidence],
    }


def _pair(pair: Pair, pictures: Pictures) -> dict[str, Any]:
    recorded = pair.recorded
    read = readings(pair)
    return {
        "prompt": recorded.prompt,
        "negative": recorded.negative,
        "seed": recorded.seed,
        "scheduler": recorded.scheduler,
        "steps": recorded.steps,
        "guidance": recorded.guidance,
        "reads": {who: {"text": one.words, "right": one.right} for who, one in read.items()},
        "engines": {
            one.variant: {
                "psnr_db": one.psnr_db,
                "ssim": one.ssim,
                "max_abs": one.largest,
                "error": one.error or None,
            }
            for one in pair.engines
        },
    }
