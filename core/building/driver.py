"""Runs a plan's nodes: looks each up in the store, sends the rest to workers, keeps going.

One worker process per component (and one each for capture and the checks) runs that component's
consecutive stages. A stage that fails takes only those with it that depend on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffoundry.artifacts.store import Entry, NewOutput, Record, Store
from diffoundry.building.group import Group
from diffoundry.building.node_keys import key_of, tools_of
from diffoundry.building.slots import Slots
from diffoundry.building.worker import Answer, Request
from diffoundry.building.workers import Worker
from diffoundry.discovery import stage_class, stage_modules
from diffoundry.errors import DiffoundryError, MissingToolError, StageError
from diffoundry.formats import canonical
from diffoundry.formats.kinds import format_of
from diffoundry.memory import free_memory
from diffoundry.planning.graph import Node, Plan, contracts_of, node_of
from diffoundry.planning.keys import source_hash, tool_version
from diffoundry.types import Artifact

Status = Literal["hit", "done", "failed", "skipped"]
ORDER = (
    "capture", "text_encoder", "unet", "vae_encoder", "vae_decoder", "preview_decoder", "check",
)  # fmt: skip
"""Workers that wait for a slot get it in this order: what others wait for comes first."""


@dataclass(frozen=True)
class Outcome:
    """What became of one node."""

    node: Node
    status: Status
    key: str | None = None
    entry: Entry | None = None
    error: DiffoundryError | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class PlannedRow:
    """One line of a dry run. `final` is False where the key still depends on a stage that has
    not run: it is then made from that stage's key, and changes if the stage makes other bytes."""

    node: Node
    key: str
    status: Literal["hit", "miss"]
    final: bool


@dataclass(frozen=True)
class Event:
    """Progress: `kind` is start, say, or an outcome's status; note concerns the whole build."""

    kind: Literal["start", "say", "note", "hit", "done", "failed", "skipped"]
    node: Node | None
    text: str = ""
    seconds: float = 0.0


Report = Callable[[Event], None]


@dataclass
class Driver:
    """Runs one plan against one store. `report` is called from several threads, one at a time.

    `memory_budget` in bytes bounds what all stages that run at once are expected to hold, and
    what a single one may allocate; without it, what the machine has free bounds the former.
    """

    plan: Plan
    store: Store
    report: Report = lambda event: None
    jobs: int = 2
    threads: int = 2
    memory_budget: int | None = None
    start_worker: Callable[[str, Path], Worker] = Worker
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._finished = {node_id: threading.Event() for node_id in self.plan.nodes}
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._workers: list[Worker] = []
        self._sources: dict[str, Artifact] = {}

    # -- keys ------------------------------------------------------------------------------

    def source_artifacts(self) -> dict[str, Artifact]:
        """The model's folders with their digests (remembered between builds)."""
        if not self._sources:
            for name, folder in self.plan.sources.items():
                function = getattr(format_of(folder.type.kind), "digest", canonical.tree_digest)
                digest = self.store.digest_of(folder.path, function)
                self._sources[name] = folder.artifact(digest)
        return self._sources

    def key_of(self, node: Node, digests: Mapping[str, str]) -> str:
        """The key of a node whose inputs have these digests."""
        return key_of(node, digests, contracts_of(node, self.plan.contracts))

    def dry_run(self) -> list[PlannedRow]:
        """Every stage with its key, hit or miss, running nothing."""
        rows: dict[str, PlannedRow] = {}
        digests: dict[str, str] = {}
        for node in self.plan.nodes.values():
            inputs, final = {}, True
            for name, reference in node.inputs.items():
                if node_of(reference) == "source":
                    inputs[name] = self.source_artifacts()[reference.partition(":")[2]].digest
                else:
                    inputs[name] = digests[reference]
                    row = rows[node_of(reference)]
                    final = final and row.final and row.status == "hit"
            key = self.key_of(node, inputs)
            entry = self.store.lookup(key)
            for output in node.outputs:
                digests[f"{node.id}:{output}"] = (
                    _digest(entry, output) if entry else f"made by {key}:{output}"
                )
            rows[node.id] = PlannedRow(node, key, "hit" if entry else "miss", final)
        return list(rows.values())

    # -- running ---------------------------------------------------------------------------

    def run(self) -> dict[str, Outcome]:
        """Run everything that is not in the store; returns node id -> outcome.

        KeyboardInterrupt kills the workers and is raised again: what is finished stays.
        """
        self.source_artifacts()
        groups: dict[str, list[Node]] = {}
        for node in self.plan.nodes.values():
            groups.setdefault(node.worker, []).append(node)
        for node in self.plan.nodes.values():
            source_hash(stage_modules()[node.stage])  # or whose code is short would start first
        names = sorted(groups, key=_rank)
        pool = ThreadPoolExecutor(max_workers=len(names) or 1)
        slots = Slots(self.jobs, self.memory_budget or free_memory())
        try:
            # In here too: the first group may have said that it starts while others are submitted.
            futures = [pool.submit(self._run_group, name, groups[name], slots) for name in names]
            for future in futures:
                while not future.done():
                    time.sleep(0.05)
                future.result()
        except BaseException:
            self.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return self.outcomes

    def stop(self) -> None:
        """Kill every worker; groups end at their next step."""
        self._stop.set()
        for event in self._finished.values():
            event.set()
        with self._guard:
            for worker in self._workers:
                worker.kill()

    def _run_group(self, name: str, nodes: list[Node], slots: Slots) -> None:
        """Run one worker's nodes in order."""
        group = Group(lambda: self._launch(name), slots, _rank(name))
        try:
            for node in nodes:
                for reference in node.inputs.values():
                    if node_of(reference) != "source":
                        self._finished[node_of(reference)].wait()
                if self._stop.is_set():
                    return
                outcome = self._run_node(node, group)
                self.outcomes[node.id] = outcome
                self._finished[node.id].set()
                text = outcome.error.text() if outcome.error else ""
                self._tell(Event(outcome.status, node, text, outcome.seconds))
        finally:
            group.close()
            for node in nodes:
                self._finished[node.id].set()

    def _run_node(self, node: Node, group: Group) -> Outcome:
        try:
            inputs = self._inputs_of(node)
        except _InputFailed as failed:
            return Outcome(node, "skipped", error=failed.error)
        key = self.key_of(node, {name: artifact.digest for name, artifact in inputs.items()})
        try:
            with self.store.lock(key):
                entry = self.store.lookup(key)
                if entry is not None:
                    return Outcome(node, "hit", key, entry)
                self._require_tools(node)
                with group.slot(node.expected_peak):
                    self._tell(Event("start", node))
                    entry = self._make(node, key, inputs, group)
        except DiffoundryError as error:
            return Outcome(node, "failed", key, error=error)
        return Outcome(node, "done", key, entry, seconds=entry.seconds)

    def _inputs_of(self, node: Node) -> dict[str, Artifact]:
        artifacts = {}
        for name, reference in node.inputs.items():
            node_id, _, output = reference.partition(":")
            if node_id == "source":
                artifacts[name] = self.source_artifacts()[output]
                continue
            outcome = self.outcomes.get(node_id)
            if outcome is None or outcome.entry is None:
                cause = outcome.error if outcome else None
                raise _InputFailed(cause or StageError(node_id, found="it did not run"))
            artifacts[name] = self.artifact(reference)
        return artifacts

    def artifact(self, reference: str) -> Artifact:
        """The artifact behind a reference of a finished node."""
        node_id, _, output = reference.partition(":")
        if node_id == "source":
            return self.source_artifacts()[output]
        outcome = self.outcomes[node_id]
        if outcome.entry is None or outcome.key is None:
            raise StageError(node_id, expected="a finished stage", found=outcome.status)
        stored = outcome.entry.outputs[output]
        return Artifact(
            stored.type,
            stored.path,
            _digest(outcome.entry, output),
            outcome.node.component,
            lineage=self._lineage(outcome.node),
            contract=stored.contract,
        )

    def _lineage(self, node: Node) -> tuple[str, ...]:
        """Keys of the stages that led to a node, oldest first, its own last."""
        keys: list[str] = []
        for reference in node.inputs.values():
            if node_of(reference) != "source":
                keys += self._lineage(self.plan.nodes[node_of(reference)])
        return tuple(dict.fromkeys([*keys, self.outcomes[node.id].key or ""]))

    def _make(self, node: Node, key: str, inputs: Mapping[str, Artifact], group: Group) -> Entry:
        with self.store.work_folder(key) as work:
            request = Request(
                stage=node.stage,
                options=dict(node.options),
                inputs=dict(inputs),
                outputs=dict(node.outputs),
                work=work,
                component=node.component,
                contracts=contracts_of(node, self.plan.contracts),
                threads=self.threads,
                journal=self.store.journal(key),
                memory_limit=self.memory_budget,
            )
            answer = group.run(request, lambda text: self._tell(Event("say", node, text)))
            return self._publish(node, key, answer)

    def _publish(self, node: Node, key: str, answer: Answer) -> Entry:
        outputs = {
            name: NewOutput(made.path, node.outputs[name], made.contract)
            for name, made in answer.outputs.items()
        }
        record = Record(
            stage=node.stage,
            component=node.component,
            seconds=round(answer.seconds, 3),
            peak_memory_bytes=answer.peak_memory_bytes,
            tools={name: tool_version(name) for name in tools_of(node)},
            notes={"digests": {name: made.digest for name, made in answer.outputs.items()}},
        )
        return self.store.publish(key, outputs, record)

    def _require_tools(self, node: Node) -> None:
        stage = stage_class(node.stage)
        missing = [name for name in stage.tools if tool_version(name) == "not installed"]
        if missing:
            raise MissingToolError(
                f"stage {node.stage}" + (f" on {node.component}" if node.component else ""),
                expected=f"installed: {', '.join(stage.tools)}",
                found=f"missing: {', '.join(missing)}",
                remedy=f'pip install "diffoundry[{stage.extra}]"',
            )

    def _tell(self, event: Event) -> None:
        with self._guard:
            self.report(event)

    def _launch(self, name: str) -> Worker:
        worker = self.start_worker(name, self.store.root / "logs" / f"{name}.log")
        with self._guard:
            self._workers.append(worker)
        if self._stop.is_set():
            worker.kill()
        return worker


class _InputFailed(Exception):
    def __init__(self, error: DiffoundryError) -> None:
        self.error = error


def _rank(worker: str) -> int:
    return ORDER.index(worker) if worker in ORDER else len(ORDER)


def _digest(entry: Entry, output: str) -> str:
    """The digest that keys are made of: the format's own, which may look past file bytes."""
    digests = entry.record.notes.get("digests", {})
    return str(digests.get(output, entry.outputs[output].digest))
