"""The decoded pictures: PSNR and SSIM each, and what is in them where a recogniser can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import Scene, parse
from diffoundry.parity.limits import has_limits, judge, strain
from diffoundry.parity.paired import compare_paired
from diffoundry.parity.playing import Played
from diffoundry.quality.differences import image_psnr_db, image_ssim, measure
from diffoundry.types import Array, CheckResult, Limits, Measure

LEVEL = "image"
PICTURES = "pictures"
RECOGNISER = "prompt_accuracy"


def check_pictures(played: Sequence[Played], limits: Limits) -> tuple[CheckResult, ...]:
    """One line over all pictures: PSNR, SSIM (mean and worst), and the limits."""
    measures: list[Measure] = []
    similarities: list[float] = []
    for number, one in enumerate(played):
        wanted, found = one.reference.image, one.image
        if found is None:
            return _failed(limits, f"picture {number} ({one.reference.prompt!r}): {one.error}")
        if found.shape != wanted.shape:
            sizes = f"{list(found.shape)} instead of {list(wanted.shape)}"
            return _failed(limits, f"picture {number} has the shape {sizes}")
        for left, right in zip(wanted, found, strict=True):
            measures.append(_measure_picture(left, right))
            similarities.append(image_ssim(left, right))
    if not measures:
        return _failed(limits, "the recording holds no picture")
    if not has_limits(limits) and limits.ssim is None:
        return _failed(limits, "no limit is set, so nothing is proven")
    return (_judge(measures, similarities, limits),)


def _measure_picture(reference: Array, image: Array) -> Measure:
    """Figures of one picture [height, width, 3]; its peak is 1, whatever it shows."""
    found = measure(reference, image)
    return dataclasses.replace(found, peak=1.0, psnr_db=image_psnr_db(reference, image))


def _judge(measures: list[Measure], similarities: list[float], limits: Limits) -> CheckResult:
    broken = []
    for one, similarity in zip(measures, similarities, strict=True):
        words = judge(one, limits)
        if limits.ssim is not None and not similarity >= limits.ssim:
            words.append(f"ssim {similarity:.6g} is below {limits.ssim:.6g}")
        broken.append(words)
    bad = [number for number, words in enumerate(broken) if words]
    numbers = range(len(measures))
    worst = max(numbers, key=lambda i: (bool(broken[i]), strain(measures[i], limits)))
    message = ""
    if bad:
        message = f"{len(bad)} of {len(measures)} pictures: " + "; ".join(broken[worst])
    decibels = [one.psnr_db for one in measures]
    return CheckResult(
        LEVEL,
        PICTURES,
        "failed" if bad else "passed",
        measure=measures[worst],
        limits=dataclasses.replace(limits, prompt_accuracy_drop=None),
        values={
            "pictures": len(measures),
            "failed_pictures": bad,
            "worst_psnr_db": min(decibels),
            "mean_psnr_db": float(np.mean(decibels)),
            "worst_ssim": min(similarities),
            "mean_ssim": float(np.mean(similarities)),
        },
        message=message,
    )


def check_prompt_accuracy(
    played: Sequence[Played],
    limits: Limits,
    read: Callable[[Array], Scene | None] = recognise,
) -> tuple[CheckResult, ...]:
    """One line: how often reference and engine show what the prompt says, in pairs.

    Only prompts that are the embedded model's captions can be read back from a picture; for any
    other the line is information that says so. Decided on only where a drop is limited.
    """
    pairs = _read_pairs(played, read)
    allowed = limits.prompt_accuracy_drop
    if isinstance(pairs, str):
        # A limit that was asked for and can't be judged is not kept.
        status: Literal["info", "failed"] = "info" if allowed is None else "failed"
        return (CheckResult(LEVEL, RECOGNISER, status, message=pairs),)
    found = compare_paired([r for r, _ in pairs], [e for _, e in pairs])
    values = dataclasses.asdict(found)
    if allowed is None:
        return (CheckResult(LEVEL, RECOGNISER, "info", values=values),)
    drop = found.reference_accuracy - found.engine_accuracy
    # A hair's breadth for the division: 0.96 − 0.95 is 0.010000000000000009.
    broken = drop > allowed + 1e-9
    message = f"prompt accuracy falls by {drop:.4g}, allowed {allowed:.4g}" if broken else ""
    return (
        CheckResult(
            LEVEL,
            RECOGNISER,
            "failed" if broken else "passed",
            limits=Limits(prompt_accuracy_drop=allowed),
            values=values,
            message=message,
        ),
    )


def _read_pairs(
    played: Sequence[Played], read: Callable[[Array], Scene | None]
) -> list[tuple[bool, bool]] | str:
    """(reference right, engine right) of every picture, or why nothing can be read."""
    pairs: list[tuple[bool, bool]] = []
    for one in played:
        try:
            scene = parse(one.reference.prompt)
            wanted = [read(picture) == scene for picture in one.reference.image]
        except ValueError as error:
            return f"what the pictures show is not judged, this model has no recogniser: {error}"
        if one.image is None or one.image.shape != one.reference.image.shape:
            found = [False] * len(wanted)
        else:
            found = [read(picture) == scene for picture in one.image]
        pairs += zip(wanted, found, strict=True)
    return pairs or "the recording holds no picture"


def _failed(limits: Limits, message: str) -> tuple[CheckResult, ...]:
    return (CheckResult(LEVEL, PICTURES, "failed", limits=limits, message=message),)
