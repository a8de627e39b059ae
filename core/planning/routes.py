"""What a route's steps are, before any node is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffoundry.discovery import stage_class
from diffoundry.models.pipeline import PREVIEW
from diffoundry.profiles.profile import Level, Profile, StageRequest, VariantRequest
from diffoundry.types import Limits, ShapePolicy


def route_of(request: VariantRequest, component: str) -> tuple[StageRequest, ...]:
    """The steps that make a component's engine: its own, or those of every component. A preview
    decoder without its own takes the other decoder's: it does the same work on the same device."""
    routes = request.component_routes
    if component == PREVIEW and component not in routes:
        component = "vae_decoder"
    return routes.get(component, request.route)


def compresses(step: StageRequest) -> bool:
    """Whether a stage changes what the component computes: a new module that is not said to be the
    same function (`exact = True`), or a plan for one."""
    if getattr(stage_class(step.stage), "exact", False):
        return False
    made = stage_class(step.stage)(**_plain_options(step)).outputs().values()
    return any(one.kind in ("torch_module", "quant_plan") for one in made)


def in_fp32(request: VariantRequest) -> VariantRequest:
    """The same variant without what lowers its precision or compresses it."""

    def full(route: Sequence[StageRequest]) -> tuple[StageRequest, ...]:
        plain_route = [
            StageRequest(stage=s.stage, **{k: v for k, v in s.options.items() if k != "precision"})
            for s in route
        ]
        return tuple(s for s in plain_route if not compresses(s) and not _needs_plan(s))

    routes = {name: full(route) for name, route in request.component_routes.items()}
    return request.model_copy(
        update={"precision": "fp32", "route": full(request.route), "component_routes": routes}
    )


def with_drift_budget(profile: Profile, sqnr_db: float) -> Profile:
    """The profile with this budget for every variant that is lossy on purpose."""
    drift: dict[Level, Limits] = {"drift": Limits(sqnr_db=sqnr_db)}
    variants = tuple(
        one.model_copy(update={"limits": {**one.limits, **drift}}) for one in profile.variants
    )
    return profile.model_copy(update={"variants": variants, "limits": {**profile.limits, **drift}})


def without_accuracy(profile: Profile) -> Profile:
    """The profile without limits of prompt accuracy, for a model whose pictures nothing here can
    read: the table says so, and the other figures of a picture are held to their limits."""

    def plain(limits: Mapping[Level, Limits]) -> dict[Level, Limits]:
        return {
            level: dataclasses.replace(one, prompt_accuracy_drop=None)
            for level, one in limits.items()
        }

    variants = tuple(
        one.model_copy(update={"limits": plain(one.limits)}) for one in profile.variants
    )
    return profile.model_copy(update={"variants": variants, "limits": plain(profile.limits)})


def _needs_plan(step: StageRequest) -> bool:
    accepted = stage_class(step.stage)(**_plain_options(step)).inputs().values()
    return any(one.kind == "quant_plan" for types in accepted for one in types)


def _plain_options(step: StageRequest) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in step.options.items()}


def options_of(
    step: StageRequest, request: VariantRequest, policy: ShapePolicy, drift: Limits
) -> dict[str, Any]:
    """A step's options; what the variant decides is filled in: `shapes`, `shape_policy`, and
    `drift_budget_db` of `drift`."""
    options = _plain_options(step)
    fields = {f.name for f in dataclasses.fields(stage_class(step.stage))}
    decided = {
        "shapes": request.shape_kind,
        "shape_policy": policy,
        "drift_budget_db": drift.sqnr_db,
    }
    return {**{k: v for k, v in decided.items() if k in fields}, **options}
