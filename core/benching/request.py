"""What a bench measures: which picture, how often, over which batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffoundry.artifacts.bundle import Bundle
from diffoundry.errors import UsageError
from diffoundry.formats import recording
from diffoundry.quality.metrics import MetricFiles

PIPELINE = "pipeline"


@dataclass(frozen=True)
class Request:
    """What was asked for. `threads` is the number every contender gets; `model` may be absent."""

    rounds: int = 20
    threads: int = 1
    batches: tuple[int, ...] = (1, 2, 4)
    model: Path | None = None
    compiled: bool = True
    pairs: int | None = None
    """Pairs of prompt and seed that are judged (None: quality is not measured)."""
    metrics: MetricFiles = field(default_factory=MetricFiles)
    """Weights for the metrics that need some."""


@dataclass(frozen=True)
class PictureTask:
    """One picture, the same for every contender; only the seed differs from round to round."""

    prompt: str
    steps: int
    guidance: float
    scheduler: str
    height: int
    width: int


def picture_task(bundle: Bundle) -> PictureTask:
    """The picture that the bundle was judged by: its first trajectory's prompt and size.

    Steps, guidance and scheduler are those that `generate` uses. Raises BundleError.
    """
    first = recording.load_pipeline(bundle.golden(PIPELINE)).trajectories[0]
    sampling = bundle.manifest.sampling
    return PictureTask(
        prompt=first.prompt,
        steps=sampling.steps,
        guidance=sampling.guidance,
        scheduler=sampling.scheduler,
        height=first.shape["height"],
        width=first.shape["width"],
    )


def usual_threads() -> int:
    """One thread for each core that this process may use."""
    import os

    import psutil

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4), sorted, each once. Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise UsageError(
            "--batch",
            expected="numbers from 1 on, with commas between",
            found=repr(text),
            remedy="for example --batch 1,2,4",
        )
    return tuple(sorted({int(word) for word in words}))
