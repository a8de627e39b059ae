"""The schedulers that step tables are built for, which of them fit a model, and how many steps.

Plain data: nothing here imports torch or diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffoundry.errors import UsageError


@dataclass(frozen=True)
class Scheduler:
    """One supported scheduler: the diffusers class behind it and what is set on top.

    `overrides` are passed to `from_config` when the scheduler is not the pipeline's own.
    `consistency` ones (LCM, TCD) run only models that were distilled for them.
    """

    name: str
    class_name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    consistency: bool = False

    @property
    def max_steps(self) -> int:
        """Tables are carried for 1 to this many steps."""
        return 8 if self.consistency else 50

    @property
    def default_steps(self) -> int:
        """A usual number of steps."""
        return 4 if self.consistency else 20


_DPMPP_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}

SCHEDULERS: Mapping[str, Scheduler] = {
    scheduler.name: scheduler
    for scheduler in (
        Scheduler("ddim", "DDIMScheduler"),
        Scheduler("pndm", "PNDMScheduler"),
        Scheduler(
            "dpmpp_2m", "DPMSolverMultistepScheduler", {**_DPMPP_2M, "use_karras_sigmas": False}
        ),
        Scheduler(
            "dpmpp_2m_karras",
            "DPMSolverMultistepScheduler",
            {**_DPMPP_2M, "use_karras_sigmas": True},
        ),
        Scheduler("unipc", "UniPCMultistepScheduler"),
        Scheduler("euler", "EulerDiscreteScheduler"),
        Scheduler("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        Scheduler("lcm", "LCMScheduler", consistency=True),
        Scheduler("tcd", "TCDScheduler", consistency=True),
    )
}


class ModelFacts(Protocol):
    """What decides which schedulers fit (`Geometry` of the model loader has both)."""

    @property
    def guidance_embedding_dim(self) -> int | None: ...

    @property
    def is_lcm(self) -> bool: ...


@dataclass(frozen=True)
class Fitting:
    """The schedulers that fit a model, and the one used when none is named."""

    names: tuple[str, ...]
    default: str


def fitting(facts: ModelFacts, own_config: Mapping[str, Any]) -> Fitting:
    """Which schedulers fit a model; `own_config` is the pipeline's scheduler_config.json.

    A consistency model takes lcm (default) and tcd. Any other takes the rest, by default its
    pipeline's own scheduler where that is supported, else ddim.
    """
    consistency = facts.is_lcm or facts.guidance_embedding_dim is not None
    names = tuple(name for name, one in SCHEDULERS.items() if one.consistency == consistency)
    own = own_scheduler(own_config)
    return Fitting(names, own if own in names else names[0])


def own_scheduler(config: Mapping[str, Any]) -> str | None:
    """The supported scheduler that a scheduler_config.json stands for, or None."""
    name = config.get("_class_name")
    if name == "DPMSolverMultistepScheduler":
        if any(config.get(key, value) != value for key, value in _DPMPP_2M.items()):
            return None
        return "dpmpp_2m_karras" if config.get("use_karras_sigmas") else "dpmpp_2m"
    return next((one.name for one in SCHEDULERS.values() if one.class_name == name), None)


def scheduler_named(name: str) -> Scheduler:
    """The scheduler called `name`. Raises UsageError with the list of those supported."""
    if name not in SCHEDULERS:
        raise UsageError(
            f"scheduler {name!r}",
            expected=f"one of {', '.join(SCHEDULERS)}",
            found=name,
            remedy="name a supported scheduler",
        )
    return SCHEDULERS[name]


def check_steps(scheduler: str, steps: int) -> None:
    """Refuse a step count that no table is carried for. Raises UsageError with the range."""
    maximum = scheduler_named(scheduler).max_steps
    if not 1 <= steps <= maximum:
        raise UsageError(
            f"{steps} steps of {scheduler}",
            expected=f"1 to {maximum} steps",
            found=str(steps),
            remedy="choose a number of steps in this range",
        )
