"""Builds the graph: sources, captures, one route per component and variant, then the checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffoundry.discovery import discover_runtimes, discover_stages, runtime_named, stage_class
from diffoundry.embedded import SHAPES_LCM
from diffoundry.errors import ProfileError, UsageError
from diffoundry.formats.canonical import canonical_json, plain, sha256_bytes
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import COMPONENTS, PREVIEW, PipelineSource, open_pipeline
from diffoundry.models.preview import with_preview_decoder
from diffoundry.planning.bounds import visits
from diffoundry.planning.captures import capture_options
from diffoundry.planning.graph import Node, Plan, SourceFolder, VariantPlan
from diffoundry.planning.judging import judging_of, readable
from diffoundry.planning.memory import Forecast
from diffoundry.planning.routes import (
    compresses,
    in_fp32,
    options_of,
    route_of,
    with_drift_budget,
    without_accuracy,
)
from diffoundry.planning.shapes import shape_policy_of
from diffoundry.profiles.profile import Level, StageRequest, VariantRequest
from diffoundry.profiles.reading import Vocabulary, read_profile, suggestion
from diffoundry.types import ArtifactType, Axis, Limits, ShapePolicy


def vocabulary() -> Vocabulary:
    """The names profiles may use, from what discovery finds."""
    stages = {
        name: {f.name: _default_of(f) for f in dataclasses.fields(cls)}
        for name, cls in discover_stages().items()
    }
    return Vocabulary(stages, tuple(discover_runtimes()), (*COMPONENTS, PREVIEW))


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def make_plan(
    model: str | Path | None,
    profile_name: str,
    components: Sequence[str] = (),
    revision: str | None = None,
    drift_budget_db: float | None = None,
    preview_vae: Path | None = None,
) -> Plan:
    """Plan a build. Imports no torch and reads only configs and file headers.

    `drift_budget_db` (SQNR) takes the place of the profile's budget of lossy variants.
    `preview_vae` is the folder of an AutoencoderTiny, whose decoder is built besides.

    Raises ModelError, ProfileError or UsageError.
    """
    profile = read_profile(profile_name, vocabulary())
    if drift_budget_db is not None:
        profile = with_drift_budget(profile, drift_budget_db)
    source = open_pipeline(model or SHAPES_LCM, revision=revision)
    if preview_vae is not None:
        source = with_preview_decoder(source, preview_vae)
    names = list(source.components)
    chosen = _chosen_components(components, names)
    axes = native_axes(source, dict(profile.axes.items()))
    contracts = {name: contract_for(source, name, axes) for name in names}
    judging = judging_of(profile, source)
    plan = Plan(
        profile=profile if readable(judging) else without_accuracy(profile),
        source=source,
        contracts=contracts,
        sources=_source_folders(source, names),
        judging=judging,
    )
    _Planner(plan, axes, [name for name in names if name in chosen]).run()
    return plan


def _chosen_components(components: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in components if name not in names]
    if unknown:
        raise UsageError(
            "--component",
            expected=f"one of {', '.join(names)}",
            found=", ".join(f"{name}{suggestion(name, names)}" for name in unknown),
            remedy="name components of the pipeline"
            + ("; this one comes with --preview-vae DIR" if PREVIEW in unknown else ""),
        )
    return tuple(components) or tuple(names)


def _source_folders(source: PipelineSource, names: Sequence[str]) -> dict[str, SourceFolder]:
    folders = {
        name: SourceFolder(
            name, ArtifactType("torch_module", "fp32"), source.components[name].folder, name
        )
        for name in names
    }
    folders["pipeline_files"] = SourceFolder(
        "pipeline_files", ArtifactType("pipeline_files"), source.path, None
    )
    return folders


@dataclasses.dataclass(frozen=True)
class _Made:
    """References of what a route ends in. `simulation` is "" unless it is lossy on purpose,
    `plan` unless it was quantized."""

    engine: str
    simulation: str = ""
    plan: str = ""


class _Planner:
    """Adds nodes to one plan; equal nodes of several variants become one."""

    def __init__(self, plan: Plan, axes: Sequence[Axis], components: Sequence[str]) -> None:
        self.plan = plan
        self.axes = axes
        self.components = components
        self.whole = set(components) == set(plan.contracts)
        self.visits = visits(plan)
        self.forecast = Forecast(plan.source, plan.contracts)

    def run(self) -> None:
        for request in self.plan.profile.variants:
            made = {c: self._route(request, c) for c in self.components}
            engines = {c: one.engine for c, one in made.items()}
            checks = {c: self._component_check(request, c, made[c]) for c in self.components}
            if self.whole:
                checks["pipeline"] = self._pipeline_check(request, engines)
            simulations = {c: one.simulation for c, one in made.items() if one.simulation}
            self.plan.variants.append(VariantPlan(request, engines, checks, simulations))

    # -- nodes -----------------------------------------------------------------------------

    def _add(
        self,
        stage: str,
        options: Mapping[str, Any],
        inputs: Mapping[str, str],
        component: str | None,
        worker: str,
        policy: ShapePolicy | None = None,
    ) -> Node:
        """Add a node, or return the equal one that is there already."""
        outputs = {
            name: dataclasses.replace(made, shape_policy=policy)
            for name, made in stage_class(stage)(**options).outputs().items()
        }
        data = [stage, plain(options), dict(inputs), component, plain(outputs)]
        short = sha256_bytes(canonical_json(data)).removeprefix("sha256:")[:8]
        node_id = f"{component or 'pipeline'}.{stage}.{short}"
        if node_id not in self.plan.nodes:
            node = Node(node_id, stage, options, inputs, outputs, component, worker)
            self.plan.nodes[node_id] = dataclasses.replace(
                node, expected_peak=self.forecast.peak_of(node)
            )
        return self.plan.nodes[node_id]

    def _capture(self, split: str, output: str) -> str:
        if output == PREVIEW:
            return self._capture_preview(split)
        inputs = {name: f"source:{name}" for name in (*COMPONENTS, "pipeline_files")}
        options = capture_options(self.plan, self.visits, split)
        node = self._add("capture", options, inputs, None, "capture")
        return f"{node.id}:{output}"

    def _capture_preview(self, split: str) -> str:
        """The preview decoder's calls on the latents of the split's trajectories: a stage of its
        own, so that what is recorded of the model itself stays in the store."""
        fields = {f.name for f in dataclasses.fields(stage_class("capture_preview"))}
        asked = capture_options(self.plan, self.visits, split)
        options = {name: value for name, value in asked.items() if name in fields}
        inputs = {"module": f"source:{PREVIEW}", "pipeline": self._capture(split, "pipeline")}
        node = self._add("capture_preview", options, inputs, PREVIEW, "capture")
        return f"{node.id}:recording"

    def _step_tables(self) -> str:
        node = self._add(
            "step_tables", {}, {"pipeline_files": "source:pipeline_files"}, None, "capture"
        )
        self.plan.step_tables = f"{node.id}:step_tables"
        return self.plan.step_tables

    def _route(self, request: VariantRequest, component: str) -> _Made:
        """Chain the stages of a component's route."""
        available = {"torch_module": f"source:{component}"}
        policy = shape_policy_of(self.plan, request)
        limits = {**self.plan.profile.limits, **request.limits}
        last, lossy = "", False
        for step in route_of(request, component):
            options = options_of(step, request, policy, limits.get("drift", Limits()))
            inputs = {
                name: self._find_input(name, accepted, available, step, request, component)
                for name, accepted in stage_class(step.stage)(**options).inputs().items()
            }
            node = self._add(step.stage, options, inputs, component, component, policy)
            if any(made.kind == "torch_module" for made in node.outputs.values()):
                available.clear()  # what came of the former module is not this one's
            for name, artifact_type in node.outputs.items():
                last = available[artifact_type.kind] = f"{node.id}:{name}"
            lossy = lossy or compresses(step)
        self._check_engine(request, component, artifact_type)
        if not lossy:
            return _Made(last)
        simulation = self._simulation(request, component, available)
        return _Made(last, simulation, available.get("quant_plan", ""))

    def _simulation(
        self, request: VariantRequest, component: str, available: Mapping[str, str]
    ) -> str:
        """The compressed component in PyTorch on the evaluation calls: what its engine is judged
        against. Raises ProfileError where the drift from the original has no budget."""
        limits = {**self.plan.profile.limits, **request.limits}
        if "drift" not in limits:
            raise ProfileError(
                f"profile {self.plan.profile.name}: variant {request.name}",
                expected="a budget for the drift of what is lossy on purpose: [limits.drift]",
                found="none",
                remedy="say how far it may go, for example sqnr_db = 20",
            )
        inputs = {
            "module": available["torch_module"],
            "recording": self._capture("evaluation", component),
        }
        if "quant_plan" in available:
            inputs["plan"] = available["quant_plan"]
        options = {"planned": "plan" in inputs}
        node = self._add("simulate", options, inputs, component, component)
        return f"{node.id}:simulation"

    def _check_engine(self, request: VariantRequest, component: str, engine: ArtifactType) -> None:
        """Raise ProfileError where a route ends in something the variant does not promise."""
        made = f"{engine.kind} {engine.precision or ''}".strip()
        where = f"profile {self.plan.profile.name}: variant {request.name}, {component}"
        if not runtime_named(request.runtime).accepts(engine):
            raise ProfileError(
                where,
                expected=f"a route that ends in what {request.runtime} opens",
                found=made,
                remedy="add the stage that makes it, or name another runtime",
            )
        if engine.precision not in (None, request.precision):
            raise ProfileError(
                where,
                expected=f"a route that ends in {request.precision}, as the variant says",
                found=made,
                remedy="set the precision of the last stage, or of the variant",
            )

    def _find_input(
        self,
        name: str,
        accepted: Sequence[ArtifactType],
        available: Mapping[str, str],
        step: StageRequest,
        request: VariantRequest,
        component: str,
    ) -> str:
        """The latest artifact of a kind that the input accepts; recordings are captured."""
        for artifact_type in accepted:
            if artifact_type.kind in available:
                return available[artifact_type.kind]
            if artifact_type.kind == "recording":
                # An input that is called so is the tuning split's: choices are not made on the
                # calls that weights are fitted to.
                return self._capture("tuning" if name == "tuning" else "calibration", component)
        raise ProfileError(
            f"profile {self.plan.profile.name}: variant {request.name}, {component}",
            expected=f"a stage before {step.stage} that makes its input {name!r}: "
            + " or ".join(t.kind for t in accepted),
            found=f"only {', '.join(sorted(available))}",
            remedy="add that stage to the route",
        )

    def _component_check(self, request: VariantRequest, component: str, made: _Made) -> str:
        recording = self._capture("evaluation", component)
        self.plan.recordings[component] = recording
        inputs = {"engine": made.engine, "recording": recording}
        if request.precision != "fp32" or made.simulation:
            # What an input changes may drown in the noise of a lower precision; it is then
            # proven on the fp32 artifact of the same export.
            inputs["reference_engine"] = self._route(in_fp32(request), component).engine
        levels: list[Level] = ["call"]
        if made.simulation:
            inputs["simulation"] = made.simulation
            if made.plan:
                inputs["plan"] = made.plan
            levels.append("drift")
        node = self._add(
            "check_component",
            self._check_options(request, levels),
            inputs,
            component,
            "check",
        )
        return f"{node.id}:parity_result"

    def _pipeline_check(self, request: VariantRequest, engines: Mapping[str, str]) -> str:
        recording = self._capture("evaluation", "pipeline")
        self.plan.recordings["pipeline"] = recording
        options = self._check_options(request, ("trajectory", "image"))
        found = {
            **engines,
            "recording": recording,
            "step_tables": self._step_tables(),
            "pipeline_files": "source:pipeline_files",
        }
        wanted = [*stage_class("check_pipeline")(**options).inputs(), PREVIEW]
        node = self._add(
            "check_pipeline",
            options,
            {name: found[name] for name in wanted if name in found},
            None,
            "check",
        )
        return f"{node.id}:parity_result"

    def _check_options(self, request: VariantRequest, levels: Sequence[Level]) -> dict[str, Any]:
        limits = {**self.plan.profile.limits, **request.limits}
        # A level that the profile leaves out keeps the check's own limits.
        options: dict[str, Any] = {
            f"{level}_limits": limits[level] for level in levels if level in limits
        }
        return {
            **options,
            "runtime": request.runtime,
            "device": request.device,
            "precision": request.precision,
        }
