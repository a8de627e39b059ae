"""Which metrics can be measured, over which weights; and the figures, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.formats.canonical import sha256_bytes, sha256_file
from diffoundry.quality.frechet import frechet_distance
from diffoundry.quality.weights import SUFFIX, check_safetensors, need_torch
from diffoundry.types import Array

if TYPE_CHECKING:
    from diffoundry.quality.clip_score import Clip
    from diffoundry.quality.inception import Inception
    from diffoundry.quality.lpips import Lpips

CLIP_NEEDED = "no CLIP model named: --clip DIR (a transformers folder with model.safetensors)"
NEEDED: Mapping[str, str] = {
    "clip_score": CLIP_NEEDED,
    "lpips": "no weights named: --lpips FILE (VGG16 or AlexNet with heads, safetensors)",
    "fid": "no weights named: --fid FILE (InceptionV3 of FID, safetensors)",
    "fid_clip": CLIP_NEEDED,
}
"""Every metric, and how to get it where its weights are not named."""
TITLES: Mapping[str, tuple[str, str]] = {
    "clip_score": ("CLIP score", ".2f"),
    "clip_score_change": ("change", "+.2f"),
    "lpips": ("LPIPS", ".4f"),
    "lpips_max": ("worst", ".4f"),
    "fid": ("FID", ".2f"),
    "fid_clip": ("CLIP-FID", ".2f"),
}
"""Figures as columns of a table: title and format."""
IS_REFERENCE = "this is what the others are held against"
FEW = 2


@dataclass(frozen=True)
class MetricFiles:
    """The weights that the user names; None: that metric is not measured, which is then said."""

    clip: Path | None = None
    lpips: Path | None = None
    fid: Path | None = None

    @property
    def any(self) -> bool:
        return any((self.clip, self.lpips, self.fid))

    def unnamed(self) -> dict[str, str]:
        """Metric -> why it is not measured."""
        named = {"clip_score": self.clip, "lpips": self.lpips, "fid": self.fid}
        return {m: why for m, why in NEEDED.items() if not named.get(m, self.clip)}

    def identities(self) -> dict[str, dict[str, str]]:
        """Name and digest of each file or folder: figures hold for these weights alone."""
        named = {"clip": self.clip, "lpips": self.lpips, "fid": self.fid}
        return {key: _identity(path) for key, path in named.items() if path is not None}


@dataclass(frozen=True)
class Seen:
    """One contender's pictures as the networks see them. `problem`: why they cannot be measured.

    Pictures are kept for LPIPS alone, which looks at pairs.
    """

    pictures: Sequence[Array] = ()
    scores: Array | None = None
    clip_features: Array | None = None
    inception_features: Array | None = None
    problem: str = ""


@dataclass(frozen=True)
class Figures:
    """One contender's figures; `not_measured` gives a reason for each that is None.

    `clip_score` is 0..100; `clip_score_change` the mean difference to the reference, picture by
    picture, and `clip_score_change_error` its standard error. `lpips` is the mean over the pairs,
    `lpips_max` the worst. `fid` and `fid_clip` are between the two sets of pictures.
    """

    clip_score: float | None = None
    clip_score_change: float | None = None
    clip_score_change_error: float | None = None
    lpips: float | None = None
    lpips_max: float | None = None
    fid: float | None = None
    fid_clip: float | None = None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    """Why this contender's pictures cannot be measured at all, or ""."""


@dataclass(frozen=True)
class Metrics:
    """The opened networks."""

    files: MetricFiles
    clip: Clip | None = None
    lpips: Lpips | None = None
    inception: Inception | None = None

    def see(self, pictures: Sequence[Array | None], prompts: Sequence[str]) -> Seen:
        """Run the networks over one contender's pictures; None is one that was not finite."""
        good = [one for one in pictures if one is not None]
        if len(good) < len(pictures):
            bad = len(pictures) - len(good)
            return Seen(problem=f"{bad} of {len(pictures)} pictures are not finite")
        seen: dict[str, Any] = {}
        if self.clip is not None:
            from diffoundry.quality.clip_score import scores

            seen["clip_features"] = self.clip.image_features(good)
            seen["scores"] = scores(seen["clip_features"], self.clip.text_features(prompts))
        if self.inception is not None:
            from diffoundry.quality.inception import features

            seen["inception_features"] = features(self.inception, good)
        return Seen(good if self.lpips else (), **seen)

    def figures(self, seen: Seen, reference: Seen | None) -> Figures:
        """Hold one contender against the reference; None: it is the reference itself."""
        missing = self.files.unnamed()
        found: dict[str, Any] = {}
        if seen.problem:
            missing.update({name: seen.problem for name in NEEDED if name not in missing})
            return Figures(not_measured=missing, problem=seen.problem)
        if seen.scores is not None:
            found["clip_score"] = float(seen.scores.mean())
        against = reference.problem if reference else IS_REFERENCE
        if against:
            words = against if reference is None else f"the reference: {against}"
            missing.update({n: words for n in ("lpips", "fid", "fid_clip") if n not in missing})
        elif reference is not None:
            found.update(self._between(reference, seen, missing))
        return Figures(**found, not_measured=missing)

    def _between(self, reference: Seen, seen: Seen, missing: dict[str, str]) -> dict[str, float]:
        found: dict[str, float] = {}
        if seen.scores is not None and reference.scores is not None:
            change = seen.scores - reference.scores
            found["clip_score_change"] = float(change.mean())
            if len(change) >= FEW:
                found["clip_score_change_error"] = float(change.std(ddof=1) / len(change) ** 0.5)
        if self.lpips is not None:
            distances = self.lpips.distances(reference.pictures, seen.pictures)
            found["lpips"], found["lpips_max"] = float(distances.mean()), float(distances.max())
        sets = {
            "fid": (reference.inception_features, seen.inception_features),
            "fid_clip": (reference.clip_features, seen.clip_features),
        }
        for name, (one, other) in sets.items():
            if one is None or other is None:
                continue
            if len(one) < FEW:
                missing[name] = "one picture has no spread: --pairs 2 or more"
            else:
                found[name] = frechet_distance(one, other)
        return found


def open_metrics(files: MetricFiles) -> Metrics:
    """Open every network that is named. Raises ModelError or MissingToolError."""
    for path, where in ((files.lpips, "LPIPS weights"), (files.fid, "InceptionV3 weights")):
        if path is not None:
            check_safetensors(path, where)
    return Metrics(
        files,
        clip=_open_clip(files.clip) if files.clip else None,
        lpips=_open_lpips(files.lpips) if files.lpips else None,
        inception=_open_inception(files.fid) if files.fid else None,
    )


def _identity(path: Path) -> dict[str, str]:
    """Of a folder, the digest of its safetensors: pickles beside them are never read."""
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    digests = "".join(f"{one.name} {sha256_file(one)}\n" for one in files)
    digest = sha256_file(path) if path.is_file() else sha256_bytes(digests.encode())
    return {"name": path.resolve().name, "digest": digest}


def small_sample_note(pairs: int) -> str:
    """What has to be said of a Fréchet distance over so few pictures, or ""."""
    if pairs >= 10_000:
        return ""
    return (
        f"FID over {pairs} pictures compares these variants with each other only: it is biased "
        "upwards for few pictures, and published figures take 10,000 or more"
    )


def _open_clip(path: Path) -> Clip:
    from diffoundry.quality.clip_score import open_clip

    return open_clip(path)


def _open_lpips(path: Path) -> Lpips:
    need_torch("LPIPS")
    from diffoundry.quality.lpips import open_lpips

    return open_lpips(path)


def _open_inception(path: Path) -> Inception:
    need_torch("FID")
    from diffoundry.quality.inception import open_inception

    return open_inception(path)
