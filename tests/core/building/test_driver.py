"""The driver: hits and misses, failures that stay local, damage, and what a dry run prints."""

from __future__ import annotations

import dataclasses
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffoundry import discovery
from diffoundry.artifacts.store import Store
from diffoundry.building import driver, workers
from diffoundry.building.budget import refuse_what_cannot_fit
from diffoundry.building.driver import Driver, Event
from diffoundry.building.worker import Answer, Request, error_event, run_request
from diffoundry.building.workers import as_exception
from diffoundry.errors import ExitCode, UsageError
from diffoundry.formats.canonical import tree_digest
from diffoundry.planning.graph import Node, SourceFolder
from diffoundry.types import ArtifactType, Contract
from tests.core.building.fake_stages.upper import RUNS

TEXT = {"text": ArtifactType("text")}


class InProcessWorker:
    """The worker's own code without a second process."""

    def __init__(self, name, log):
        self.log = log

    def run(self, request: Request, say) -> Answer:
        try:
            return run_request(request, say)
        except Exception as error:
            event = error_event(error, request.stage, request.component)
            raise as_exception(event["error"], self.log) from error

    def alive(self):
        return True

    def close(self):
        pass

    kill = close


@pytest.fixture(autouse=True)
def _fake_stages(monkeypatch):
    monkeypatch.setattr(discovery, "STAGE_PACKAGES", ("tests.core.building.fake_stages",))
    RUNS.clear()


def node(component, stage, inputs, **options):
    return Node(f"{component}.{stage}", stage, options, inputs, TEXT, component, component)


@pytest.fixture
def build(tmp_path):
    """build(nodes...) runs a plan over one source file; build.events collects the progress."""
    source = tmp_path / "source.txt"
    source.write_text("hello")
    store = Store(tmp_path / "store")

    def run(*nodes, dry=False, start_worker=InProcessWorker, memory_budget=None):
        plan = SimpleNamespace(
            nodes={n.id: n for n in nodes},
            sources={"text": SourceFolder("text", ArtifactType("text"), source, None)},
            contracts={n.component: Contract(n.component, (), (), ()) for n in nodes},
        )
        run.driver = Driver(
            plan, store, run.events.append, memory_budget=memory_budget, start_worker=start_worker
        )
        return run.driver.dry_run() if dry else run.driver.run()

    run.events = []
    run.source = source
    run.store = store
    return run


CHAIN = (
    node("a", "upper", {"text": "source:text"}),
    node("b", "upper", {"text": "a.upper:text"}, suffix="!"),
)


def test_a_chain_runs_once_and_then_comes_from_the_store(build):
    outcomes = build(*CHAIN)
    assert build.driver.artifact("b.upper:text").path.read_text() == "HELLO!"
    assert [o.status for o in outcomes.values()] == ["done", "done"]
    assert len(build.driver.artifact("b.upper:text").lineage) == 2
    assert {o.status for o in build(*CHAIN).values()} == {"hit"}
    assert len(RUNS) == 2


def test_a_changed_option_runs_only_its_stage_again(build):
    build(*CHAIN)
    RUNS.clear()
    outcomes = build(CHAIN[0], node("b", "upper", {"text": "a.upper:text"}, suffix="?"))
    assert RUNS == ["b?"]
    assert outcomes["a.upper"].status == "hit"


def test_a_changed_source_runs_everything_again(build):
    build(*CHAIN)
    build.source.write_text("other words")
    assert {o.status for o in build(*CHAIN).values()} == {"done"}


def test_equal_bytes_from_a_changed_stage_leave_later_stages_alone(build):
    """Keys are made of contents: `a` is made anew, `b` sees the same bytes."""
    build(*CHAIN)
    build.source.write_text("HELLO")
    outcomes = build(*CHAIN)
    assert [outcomes[n].status for n in ("a.upper", "b.upper")] == ["done", "hit"]


def test_a_failure_keeps_its_words_and_takes_only_dependents(build):
    outcomes = build(
        node("a", "upper", {"text": "source:text"}, fail=True),
        node("b", "upper", {"text": "a.upper:text"}),
        node("c", "upper", {"text": "source:text"}, suffix="c"),
    )
    assert [outcomes[f"{n}.upper"].status for n in "abc"] == ["failed", "skipped", "done"]
    error = outcomes["a.upper"].error
    assert "the converter's own words" in error.found and "upper on a" in error.where
    assert str(build.store.root / "logs" / "a.log") in error.remedy
    assert outcomes["b.upper"].error is error


def test_a_missing_tool_fails_with_the_install_line(build):
    outcomes = build(node("a", "needs_missing_tool", {"text": "source:text"}))
    error = outcomes["a.needs_missing_tool"].error
    assert error.exit_code == ExitCode.MISSING_TOOL
    assert 'pip install "diffoundry[imaginary]"' in error.remedy
    assert RUNS == []


def test_an_entry_damaged_by_hand_is_reported_and_made_again(build):
    build(*CHAIN)
    reports = []
    build.store.report = reports.append
    path = build.driver.artifact("a.upper:text").path
    path.chmod(0o644)
    path.write_text("damaged")
    outcomes = build(*CHAIN)
    assert outcomes["a.upper"].status == "done"
    assert any("damaged" in line for line in reports)
    assert build.driver.artifact("a.upper:text").path.read_text() == "HELLO"


def test_a_dry_run_lists_keys_without_running(build):
    rows = build(*CHAIN, dry=True)
    assert [(r.status, r.final) for r in rows] == [("miss", True), ("miss", False)]
    assert RUNS == []
    build(*CHAIN)
    again = build(*CHAIN, dry=True)
    assert [(r.status, r.final) for r in again] == [("hit", True), ("hit", True)]
    assert again[0].key == rows[0].key and again[1].key != rows[1].key


def test_progress_names_every_stage(build):
    build(*CHAIN)
    kinds = [event.kind for event in build.events if isinstance(event, Event)]
    assert kinds == ["start", "say", "done", "start", "say", "done"]


def test_outputs_are_digested_by_content(build):
    build(CHAIN[0])
    artifact = build.driver.artifact("a.upper:text")
    assert artifact.digest == tree_digest(artifact.path)


def test_ctrl_c_while_the_groups_are_being_started_stops_them(build, monkeypatch):
    interrupted = threading.Event()

    class Interrupted(ThreadPoolExecutor):
        def submit(self, function, name, *arguments):
            if name == "b":  # the first group is on its way
                interrupted.set()
                raise KeyboardInterrupt
            return super().submit(function, name, *arguments)

    class Waiting(InProcessWorker):
        def run(self, request, say):
            assert interrupted.wait(30)
            return super().run(request, say)

    monkeypatch.setattr(driver, "ThreadPoolExecutor", Interrupted)
    chain = (*CHAIN, node("c", "upper", {"text": "a.upper:text"}, suffix="?"))
    with pytest.raises(KeyboardInterrupt):
        build(*chain, start_worker=Waiting)
    assert build.driver._stop.is_set()
    assert len(RUNS) <= 1, "other stages went on after Ctrl-C"


# -- memory -----------------------------------------------------------------------------------


@pytest.fixture
def real_workers(monkeypatch):
    """Worker processes that find the fake stages."""
    starter = (
        "from diffoundry import discovery; from diffoundry.building import worker; "
        "discovery.STAGE_PACKAGES = ('tests.core.building.fake_stages',); worker.main()"
    )
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", starter])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return workers.Worker


def test_a_stage_beyond_the_budget_fails_alone_and_says_so(build, real_workers):
    nodes = (
        node("a", "allocates", {"text": "source:text"}, megabytes=4000),
        node("b", "upper", {"text": "source:text"}),
    )
    outcomes = build(*nodes, start_worker=real_workers, memory_budget=2 << 30)
    assert [outcomes[n.id].status for n in nodes] == ["failed", "done"]
    error = outcomes["a.allocates"].error
    assert "allocates on a" in error.where and "memory ran out" in error.found
    assert "--memory-budget" in error.remedy
    again = build(*nodes, start_worker=real_workers, memory_budget=16 << 30)
    assert [again[n.id].status for n in nodes] == ["done", "hit"]


def test_a_worker_that_the_kernel_kills_leaves_the_rest_and_its_size(build, real_workers):
    killed = node("a", "allocates", {"text": "source:text"}, megabytes=300, killed=True)
    other = node("b", "upper", {"text": "source:text"})
    outcomes = build(killed, other, start_worker=real_workers)
    error = outcomes["a.allocates"].error
    assert outcomes["b.upper"].status == "done"
    assert "SIGKILL" in error.found and "memory runs out" in error.found


def test_what_cannot_fit_is_refused_before_it_starts(build):
    heavy = dataclasses.replace(node("a", "upper", {"text": "source:text"}), expected_peak=5 << 30)
    light = node("b", "upper", {"text": "source:text"})
    rows = build(heavy, light, dry=True)
    with pytest.raises(UsageError) as caught:
        refuse_what_cannot_fit(rows, 4 << 30)
    assert "a · upper about 5.0 GiB" in caught.value.found and "b · " not in caught.value.found
    assert "--memory-budget 5GiB would do" in caught.value.remedy
    refuse_what_cannot_fit(rows, 5 << 30)
    build(heavy, light)
    refuse_what_cannot_fit(build(heavy, light, dry=True), 1)  # everything is in the store
