"""How pictures are checked: what the profile leaves open is filled in from the model."""

from __future__ import annotations

import contextlib
import os

from diffoundry.embedded import SHAPES_LCM
from diffoundry.embedded.scenes import parse
from diffoundry.errors import ProfileError
from diffoundry.models.pipeline import PipelineSource
from diffoundry.planning.graph import Judging
from diffoundry.profiles.profile import Profile
from diffoundry.profiles.reading import read_prompts, suggestion
from diffoundry.sampling.schedulers import check_steps, fitting


def is_embedded(source: PipelineSource) -> bool:
    """Whether this is the model that Diffoundry ships."""
    return os.path.realpath(source.path) == os.path.realpath(SHAPES_LCM)


def judging_of(profile: Profile, source: PipelineSource) -> Judging:
    """Fill in what the profile leaves to the model."""
    check = profile.check
    lcm = source.geometry.is_lcm
    if is_embedded(source) and profile.prompts == "default":
        from diffoundry.embedded.prompts import load_split

        splits = {
            name: [(pair.prompt, pair.seed) for pair in load_split(name)]
            for name in ("calibration", "tuning", "evaluation")
        }
    else:
        splits = read_prompts(profile.prompts)
    judged = check.judge_pairs or (16 if is_embedded(source) else 1)
    if judged > len(splits["evaluation"]):
        raise ProfileError(
            f"profile {profile.name}: check.judge_pairs",
            expected=f"at most {len(splits['evaluation'])}, the evaluation pairs there are",
            found=str(judged),
            remedy="lower it, or give more prompts",
        )
    guidance = check.guidance
    if guidance is None:
        guidance = _default_guidance(source)
    steps = check.steps or (4 if lcm else 10)
    scheduler = _scheduler(profile, source)
    check_steps(scheduler, steps)
    return Judging(
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        negative=check.negative,
        pairs=tuple(splits["evaluation"][:judged]),
        calibration=tuple(splits["calibration"][: check.calibration_pairs]),
        tuning=tuple(splits["tuning"][: check.tuning_pairs]),
    )


def readable(judging: Judging) -> bool:
    """Whether a recogniser can tell of any of the pictures that are judged what it should show."""
    for prompt, _ in judging.pairs:
        with contextlib.suppress(ValueError):
            parse(prompt)
            return True
    return False


def _scheduler(profile: Profile, source: PipelineSource) -> str:
    """The profile's scheduler where it fits the model, else the model's own."""
    fits = fitting(source.geometry, source.scheduler)
    wanted = profile.check.scheduler
    if wanted is not None and wanted not in fits.names:
        raise ProfileError(
            f"profile {profile.name}: check.scheduler",
            expected=f"one that fits this model: {', '.join(fits.names)}",
            found=f"{wanted}{suggestion(wanted, fits.names)}",
            remedy="name one of these, or leave it out",
        )
    return wanted or fits.default


def _default_guidance(source: PipelineSource) -> float:
    """Of the embedded model: as trained. Of others: the diffusers pipeline's own default."""
    if is_embedded(source):
        from diffoundry.embedded import DEFAULT_GUIDANCE

        return DEFAULT_GUIDANCE
    return 8.5 if source.geometry.is_lcm else 7.5
