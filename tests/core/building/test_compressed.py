"""Records of what was made smaller are found among what an engine was made from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffoundry.artifacts.content import CompressionContent
from diffoundry.building.compressed import (
    compression_of,
    is_compressed,
    record_references,
    variant_is_compressed,
)
from diffoundry.formats import prune_record, quant_plan
from diffoundry.planning.graph import Node, Plan, VariantPlan
from diffoundry.types import ArtifactType, Precision

MODULE = ArtifactType("torch_module", "fp32")
RECORD, PLAN = ArtifactType(prune_record.KIND), ArtifactType(quant_plan.KIND)


def node(node_id: str, inputs: dict[str, str], **outputs: ArtifactType) -> Node:
    return Node(node_id, node_id, {}, inputs, outputs, "unet", "unet")


NODES = (
    node("prune", {"module": "source:unet"}, record=RECORD, module=MODULE),
    node("other_prune", {"module": "source:unet"}, record=RECORD, module=MODULE),
    node("again", {"module": "prune:module"}, record=RECORD, module=MODULE),
    node("observe", {"module": "again:module"}, plan=PLAN),
    node("repair", {"plan": "observe:plan", "module": "again:module"}, plan=PLAN),
    node("apply", {"plan": "repair:plan", "module": "again:module"},
         engine=ArtifactType("onnx", "int8")),
    node("export", {"module": "source:unet"}, engine=ArtifactType("onnx", "fp32")),
    node("export_pruned", {"module": "other_prune:module"}, engine=ArtifactType("onnx", "fp32")),
    node("build_later", {"module": "source:unet"}, engine=ArtifactType("tensorrt_build")),
)  # fmt: skip


def plan_of() -> Plan:
    plan: Any = SimpleNamespace(nodes={one.id: one for one in NODES})
    plan.ancestors = lambda references: Plan.ancestors(plan, references)
    return plan  # type: ignore[no-any-return]


def variant(
    engine: str, precision: Precision = "fp32", simulations: dict[str, str] | None = None
) -> VariantPlan:
    request: Any = SimpleNamespace(precision=precision)
    return VariantPlan(request, {"unet": f"{engine}:engine"}, {}, simulations or {})


def test_records_come_in_the_order_of_the_route_and_others_stay_out() -> None:
    found = record_references(plan_of(), "apply:engine")
    assert found[prune_record.KIND] == ["prune:record", "again:record"]
    assert found[quant_plan.KIND] == ["observe:plan", "repair:plan"]
    assert not any(record_references(plan_of(), "export:engine").values())


def test_precision_records_and_a_simulation_each_make_a_variant_compressed() -> None:
    plan = plan_of()
    assert variant_is_compressed(plan, variant("apply", "int8"))
    assert variant_is_compressed(plan, variant("export_pruned"))
    assert variant_is_compressed(plan, variant("export", simulations={"unet": "s:simulation"}))
    assert not variant_is_compressed(plan, variant("export"))


def test_a_build_specification_has_the_precision_of_its_variant() -> None:
    plan = plan_of()
    assert is_compressed(plan, variant("build_later", "fp16"), "unet")
    assert not is_compressed(plan, variant("build_later"), "unet")


def test_a_component_left_in_float_is_not_compressed_though_its_variant_is() -> None:
    assert not is_compressed(plan_of(), variant("export", "int8"), "unet")


def test_the_last_plan_and_every_prune_record_are_published(tmp_path: Path) -> None:
    driver: Any = SimpleNamespace(
        plan=plan_of(), artifact=lambda reference: SimpleNamespace(path=tmp_path / reference)
    )
    found = compression_of(driver, variant("apply", "int8", {"unet": "s:simulation"}))
    assert found == {
        "unet": CompressionContent(
            plan=tmp_path / "repair:plan" / "plan.json",
            prune=(
                tmp_path / "prune:record" / "prune.json",
                tmp_path / "again:record" / "prune.json",
            ),
            simulation=tmp_path / "s:simulation",
        )
    }
    assert compression_of(driver, variant("export")) == {}
