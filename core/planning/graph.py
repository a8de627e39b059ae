"""The graph of a build: nodes (stages with options) joined by named artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffoundry.models.pipeline import PREVIEW, PipelineSource
from diffoundry.profiles.profile import Profile, VariantRequest
from diffoundry.types import Artifact, ArtifactType, Contract


@dataclass(frozen=True)
class Node:
    """One stage run. `inputs` maps an input name to "<node id>:<output>" or "source:<name>".

    `component` is None for stages that see the whole pipeline. `worker` names the process that
    runs it: consecutive nodes of one worker share one process. `expected_peak` is the memory in
    bytes that it is expected to hold at most.
    """

    id: str
    stage: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, ArtifactType]
    component: str | None
    worker: str
    expected_peak: int = 0

    @property
    def title(self) -> str:
        """What people see: component, stage, and what tells it from its like."""
        detail = self.options.get("split") or self.options.get("precision")
        return f"{self.component or 'pipeline'} · {self.stage}" + (f" {detail}" if detail else "")


@dataclass(frozen=True)
class VariantPlan:
    """Where a variant's engines and checks come from: references into the graph."""

    request: VariantRequest
    engines: Mapping[str, str]
    checks: Mapping[str, str]
    """Component name, or "pipeline" -> reference of its parity_result."""
    simulations: Mapping[str, str] = field(default_factory=dict)
    """Component name -> reference of what it computes when compressed; lossy variants alone."""


@dataclass(frozen=True)
class Judging:
    """The settings that pictures are checked with, after the model's defaults are filled in."""

    steps: int
    guidance: float
    scheduler: str
    negative: str
    pairs: tuple[tuple[str, int], ...]
    calibration: tuple[tuple[str, int], ...]
    tuning: tuple[tuple[str, int], ...]


@dataclass
class Plan:
    """Everything a build needs to know before it starts."""

    profile: Profile
    source: PipelineSource
    contracts: Mapping[str, Contract]
    sources: Mapping[str, SourceFolder]
    judging: Judging
    nodes: dict[str, Node] = field(default_factory=dict)
    variants: list[VariantPlan] = field(default_factory=list)
    recordings: dict[str, str] = field(default_factory=dict)
    """Component name, or "pipeline" -> reference of its evaluation recording."""
    step_tables: str = ""

    @property
    def whole(self) -> bool:
        """Whether every component is built: only then is there a bundle to publish."""
        return all("pipeline" in variant.checks for variant in self.variants)

    def ancestors(self, references: list[str]) -> set[str]:
        """Ids of the nodes that these references depend on, themselves included."""
        found: set[str] = set()
        waiting = [node_of(reference) for reference in references]
        while waiting:
            node_id = waiting.pop()
            if node_id == "source" or node_id in found:
                continue
            found.add(node_id)
            waiting += [node_of(reference) for reference in self.nodes[node_id].inputs.values()]
        return found


@dataclass(frozen=True)
class SourceFolder:
    """A folder of the model that enters the graph as it is."""

    name: str
    type: ArtifactType
    path: Path
    component: str | None

    def artifact(self, digest: str) -> Artifact:
        return Artifact(self.type, self.path, digest, self.component)


def contracts_of(node: Node, contracts: Mapping[str, Contract]) -> dict[str, Contract]:
    """Those of `contracts` that a node sees: its component's, else all; a preview decoder's only
    where it is among the inputs, since the rest of a build does not depend on it."""
    if node.component is not None:
        return {node.component: contracts[node.component]}
    return {n: one for n, one in contracts.items() if n != PREVIEW or n in node.inputs}


def node_of(reference: str) -> str:
    """The node that a reference names ("source" for the model's own folders)."""
    return reference.partition(":")[0]
