"""The checks of a whole variant: every recorded trajectory played again on its engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from diffoundry.formats.recording import PipelineRecording
from diffoundry.generation import Tables, TextEncoder, TextToImage
from diffoundry.models.geometry import Geometry
from diffoundry.models.pipeline import PREVIEW
from diffoundry.parity.checks import image, preview, trajectory
from diffoundry.parity.playing import Played, play
from diffoundry.parity.subject import guarded
from diffoundry.types import CheckResult, Limits, ParityResult, Session

OpenSessions = Callable[[], Mapping[str, Session]]
TRAJECTORY_LIMITS = Limits(max_abs=1e-3)
IMAGE_LIMITS = Limits(psnr_db=50.0)
SUBJECT = "pipeline"


def check_pipeline(
    open_engines: OpenSessions,
    tokenizer: TextEncoder,
    tables: Tables,
    geometry: Geometry,
    recording: PipelineRecording,
    trajectory_limits: Limits = TRAJECTORY_LIMITS,
    image_limits: Limits = IMAGE_LIMITS,
    say: Callable[[str], None] = lambda line: None,
) -> ParityResult:
    """Open the engines (text_encoder, unet, vae_decoder), play every trajectory, close them.

    Where there is a preview_decoder among them, what its pictures are worth is said besides.
    Engines that do not open have failed; those that this host cannot open are deferred. Raises
    MissingToolError and ModelError.
    """

    def run() -> tuple[CheckResult, ...]:
        sessions = open_engines()
        try:
            pipeline = TextToImage(sessions, tokenizer, tables, geometry)
            played = []
            for number, one in enumerate(recording.trajectories, 1):
                say(f"trajectory {number}/{len(recording.trajectories)}")
                played.append(play(pipeline, one))
            previews: tuple[CheckResult, ...] = ()
            if PREVIEW in sessions:
                previewing = pipeline.with_decoder(sessions[PREVIEW])
                previews = preview.check_previews(previewing, recording.trajectories)
        finally:
            for session in sessions.values():
                session.close()
        return (*check_played(played, trajectory_limits, image_limits), *previews)

    return ParityResult(SUBJECT, guarded(trajectory.LEVEL, None, run))


def check_played(
    played: Sequence[Played], trajectory_limits: Limits, image_limits: Limits
) -> tuple[CheckResult, ...]:
    """Every check of played trajectories, each guarded."""
    checks = (
        (trajectory.LEVEL, trajectory.check_trajectories, trajectory_limits),
        (image.LEVEL, image.check_pictures, image_limits),
        (image.LEVEL, image.check_prompt_accuracy, image_limits),
    )
    lines: list[CheckResult] = []
    for level, check, limits in checks:
        lines += guarded(level, None, functools.partial(check, played, limits))
    return tuple(lines)
