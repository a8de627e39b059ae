"""Stages of a profile run one by one, each in a fresh process, without capture and checks.

A whole build records the original first. What a stage alone needs in seconds and memory is known
sooner with a stand-in for the recording: inputs of the contract's shapes, drawn from a seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffoundry.building.worker import Request
from diffoundry.building.workers import Worker
from diffoundry.errors import DiffoundryError
from diffoundry.formats import canonical, recording
from diffoundry.planning.graph import Node, Plan
from diffoundry.planning.planner import make_plan
from diffoundry.types import Artifact, ArtifactType, Contract

RECORDED_BY = "capture"
LEFT_OUT = ("capture", "step_tables", "check_component", "check_pipeline", "simulate")
CALLS = 4


@dataclass(frozen=True)
class Row:
    """What one stage needed; `problem` says why the figures are None."""

    profile: str
    component: str
    stage: str
    precision: str
    seconds: float | None
    peak_memory_bytes: int | None
    size_bytes: int | None
    problem: str = ""


def run_stages(
    model: str,
    profiles: Sequence[str],
    components: Sequence[str],
    scratch: Path,
    threads: int,
    shared: bool,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """Run every stage that makes an engine, in order; equal stages of two profiles run once.

    `shared`: the stages of one component share a process, as far as one profile goes. What a
    stage made stays in `scratch`, and is not made again.
    """
    done: dict[str, dict[str, Artifact]] = {}
    for profile in profiles:
        plan = make_plan(model, profile, components)
        for component in components:
            nodes = [one for one in plan.nodes.values() if one.component == component]
            worker: Worker | None = None
            for node in (one for one in nodes if one.stage not in LEFT_OUT):
                name = f"{node.id}.{profile}"
                if node.id in done:
                    continue
                if worker is None or not shared or not worker.alive():
                    if worker is not None:
                        worker.close()
                    worker = Worker(name, scratch / "logs" / f"{name}.log")
                say(f"{profile}: {node.title}")
                yield _run(plan, node, done, worker, scratch, threads, say)
            if worker is not None:
                worker.close()


def _run(
    plan: Plan,
    node: Node,
    done: dict[str, dict[str, Artifact]],
    worker: Worker,
    scratch: Path,
    threads: int,
    say: Callable[[str], None],
) -> Row:
    component = node.component or ""
    precision = str(node.options.get("precision", ""))
    work = scratch / node.id
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        request = Request(
            node.stage, dict(node.options), _inputs(plan, node, done, scratch),
            dict(node.outputs), work, component, dict(plan.contracts), threads,
        )  # fmt: skip
        answer = worker.run(request, say)
    except (DiffoundryError, KeyError) as error:
        found = str(error) if isinstance(error, DiffoundryError) else f"{error} was not made"
        return Row(plan.profile.name, component, node.stage, precision, None, None, None, found)
    done[node.id] = {
        name: Artifact(
            node.outputs[name], made.path, made.digest, component, contract=made.contract
        )
        for name, made in answer.outputs.items()
    }
    size = sum(made.size_bytes for made in answer.outputs.values())
    return Row(plan.profile.name, component, node.stage, precision,
               answer.seconds, answer.peak_memory_bytes, size)  # fmt: skip


def _inputs(
    plan: Plan, node: Node, done: dict[str, dict[str, Artifact]], scratch: Path
) -> dict[str, Artifact]:
    found = {}
    for name, reference in node.inputs.items():
        origin, _, output = reference.partition(":")
        if origin == "source":
            found[name] = plan.sources[output].artifact("sha256:")
        elif plan.nodes[origin].stage == RECORDED_BY:
            found[name] = drawn_recording(plan.contracts[output], scratch / f"drawn-{output}")
        else:
            found[name] = done[origin][output]
    return found


def drawn_recording(contract: Contract, folder: Path) -> Artifact:
    """A recording of `CALLS` calls at the usual shape whose arrays are drawn, outputs too."""
    if not folder.exists():
        calls = tuple(_drawn_call(contract, number) for number in range(CALLS))
        recording.save(recording.ComponentRecording(contract, calls, (), (), {}), folder)
    return Artifact(ArtifactType("recording"), folder, "sha256:", contract.component)


def _drawn_call(contract: Contract, seed: int) -> recording.Call:
    draw, shape = np.random.default_rng(seed), contract.opt_shape()
    feeds = {}
    for spec in contract.inputs:
        size = spec.shape(shape)
        if spec.name == "timestep":
            feeds[spec.name] = np.full(size, 999.0 / (1 + seed), np.float32)
        elif spec.dtype == "float32":
            feeds[spec.name] = draw.standard_normal(size, np.float32)
        else:
            feeds[spec.name] = draw.integers(0, 1000, size).astype(spec.dtype)
    outputs = {s.name: draw.standard_normal(s.shape(shape), np.float32) for s in contract.outputs}
    return recording.Call(feeds, outputs, shape, "")


def as_document(row: Row) -> dict[str, object]:
    """The row as plain data."""
    return dict(canonical.plain(row))
