"""Planning with a preview decoder: one component more, and nothing else of a build changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffoundry.artifacts.store import Store
from diffoundry.building.driver import Driver
from diffoundry.errors import UsageError
from diffoundry.models.pipeline import PREVIEW
from diffoundry.planning.graph import Node, Plan, node_of
from diffoundry.planning.planner import make_plan
from tests.mini_pipelines import make_named, make_tiny_vae

HEAD = 'schema = "diffoundry.profile/1.0"\nname = "mine"\n[[variants]]\nname = "one"\n'
FUSED = """runtime = "onnx_session"
route = [
    { stage = "exported_program_from_torch" },
    { stage = "onnx_from_exported_program" },
    { stage = "fuse_onnx" },
]
"""
PROFILES = ("all", "edge-pruned-int8", "onnx-cpu-int8", "onnx-cpu-slim")
PLAIN = '[{ stage = "exported_program_from_torch" }, { stage = "onnx_from_exported_program" }]'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("tiny") / "vae")


def readers(plan: Plan, wanted: set[str]) -> set[str]:
    """Stages that read an output of the nodes `wanted`."""
    return {
        node.stage
        for node in plan.nodes.values()
        if {node_of(reference) for reference in node.inputs.values()} & wanted
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_every_kind_of_profile_builds_and_checks_it(model: Path, tiny: Path, profile: str) -> None:
    plan = make_plan(model, profile, preview_vae=tiny)
    assert plan.whole and set(plan.recordings) == {*plan.contracts, "pipeline"}
    for variant in plan.variants:
        assert {PREVIEW, "pipeline"} <= set(variant.checks)
        check = plan.nodes[node_of(variant.checks["pipeline"])]
        assert check.inputs[PREVIEW] == variant.engines[PREVIEW]
    # What judges an engine is never seen by what shapes it.
    captures = {n.id for n in plan.nodes.values() if n.stage == "capture_preview"}
    evaluation = {i for i in captures if plan.nodes[i].options["split"] == "evaluation"}
    assert len(evaluation) == 1
    assert readers(plan, evaluation) <= {"check_component", "simulate"}
    for node_id in captures:
        node = plan.nodes[node_id]
        source = plan.nodes[node_of(node.inputs["pipeline"])]
        assert node.options["split"] == source.options["split"]


@pytest.mark.parametrize("profile", ["onnx-cpu", "onnx-cpu-int8"])
def test_the_keys_of_everything_else_stay(
    model: Path, tiny: Path, profile: str, tmp_path: Path
) -> None:
    def keys(plan: Plan) -> dict[str, str]:
        rows = Driver(plan, Store(tmp_path)).dry_run()
        return {row.key: row.node.stage for row in rows}

    without, with_it = (keys(make_plan(model, profile, preview_vae=one)) for one in (None, tiny))
    changed = {stage for key, stage in without.items() if key not in with_it}
    assert changed == {"check_pipeline"}  # it plays the previews too


def test_another_decoder_is_another_key(model: Path, tiny: Path, tmp_path: Path) -> None:
    def key(folder: Path) -> set[str]:
        plan = make_plan(model, "onnx-cpu", preview_vae=folder)
        return {row.key for row in Driver(plan, Store(tmp_path / "store")).dry_run()
                if row.node.component == PREVIEW}  # fmt: skip

    assert not key(tiny) & key(make_tiny_vae(tmp_path / "vae", seed=7))


def stages(plan: Plan, component: str) -> list[str]:
    """The stages of a component's route."""
    made: list[Node] = []
    reference = plan.variants[0].engines[component]
    while node_of(reference) != "source":
        made.append(plan.nodes[node_of(reference)])
        reference = next(iter(made[-1].inputs.values()))
    return [node.stage for node in reversed(made)]


def test_it_takes_the_decoders_route_where_it_has_none_of_its_own(
    model: Path, tiny: Path, tmp_path: Path
) -> None:
    def plan(more: str = "") -> Plan:
        (tmp_path / "mine.toml").write_text(HEAD + FUSED + more)
        return make_plan(model, str(tmp_path / "mine.toml"), preview_vae=tiny)

    assert stages(plan(), PREVIEW)[-1] == "fuse_onnx"
    routes = f"[variants.component_routes]\nvae_decoder = {PLAIN}\n"
    assert stages(plan(routes), PREVIEW)[-1] == "onnx_from_exported_program"
    assert stages(plan(routes), "unet")[-1] == "fuse_onnx"
    own = f"[variants.component_routes]\npreview_decoder = {PLAIN}\n"
    assert stages(plan(own), PREVIEW)[-1] == "onnx_from_exported_program"
    assert stages(plan(own), "vae_decoder")[-1] == "fuse_onnx"


def test_it_can_be_built_alone_where_it_is_there(model: Path, tiny: Path) -> None:
    plan = make_plan(model, "onnx-cpu", (PREVIEW,), preview_vae=tiny)
    assert not plan.whole and set(plan.variants[0].engines) == {PREVIEW}
    with pytest.raises(UsageError, match="--preview-vae"):
        make_plan(model, "onnx-cpu", (PREVIEW,))
