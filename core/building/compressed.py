"""Which variants were made smaller on purpose, and the records that say how."""

from __future__ import annotations

from diffoundry.artifacts.content import CompressionContent
from diffoundry.building.driver import Driver
from diffoundry.formats import prune_record, quant_plan
from diffoundry.planning.graph import Plan, VariantPlan

PLAN, PRUNE = quant_plan.KIND, prune_record.KIND
FILES = {PLAN: quant_plan.PLAN_FILE, PRUNE: prune_record.FILE}


def record_references(plan: Plan, engine: str) -> dict[str, list[str]]:
    """Kind -> references of the records among what an engine was made from, oldest first."""
    needed = plan.ancestors([engine])
    found: dict[str, list[str]] = {PLAN: [], PRUNE: []}
    for node_id, node in plan.nodes.items():  # a node stands after those that it needs
        if node_id in needed:
            for name, made in node.outputs.items():
                if made.kind in found:
                    found[made.kind].append(f"{node_id}:{name}")
    return found


def is_compressed(plan: Plan, variant: VariantPlan, component: str) -> bool:
    """Whether an engine lost something on purpose on its way: precision, units, or its weights'
    own values."""
    node_id, _, output = variant.engines[component].partition(":")
    precision = plan.nodes[node_id].outputs[output].precision or variant.request.precision
    records = record_references(plan, variant.engines[component])
    return precision != "fp32" or component in variant.simulations or any(records.values())


def variant_is_compressed(plan: Plan, variant: VariantPlan) -> bool:
    """Whether a variant has to show that it pays."""
    return any(is_compressed(plan, variant, component) for component in variant.engines)


def compression_of(driver: Driver, variant: VariantPlan) -> dict[str, CompressionContent]:
    """Component -> its records, for those components that have some.

    Of several plans the last one counts: it is what the engine was made from.
    """
    content = {}
    for component, engine in variant.engines.items():
        found = record_references(driver.plan, engine)
        simulation = variant.simulations.get(component)
        if simulation or any(found.values()):
            files = {
                kind: [driver.artifact(one).path / FILES[kind] for one in references]
                for kind, references in found.items()
            }
            content[component] = CompressionContent(
                plan=files[PLAN][-1] if files[PLAN] else None,
                prune=tuple(files[PRUNE]),
                simulation=driver.artifact(simulation).path if simulation else None,
            )
    return content
