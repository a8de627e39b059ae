"""`diffoundry build`: plan, run, publish, and say what came of it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffoundry.artifacts.store import Store, default_root
from diffoundry.building.budget import refuse_what_cannot_fit
from diffoundry.building.driver import Driver, Event, Outcome, PlannedRow, Report
from diffoundry.building.publishing import (
    Publication,
    check_output_folder,
    judge,
    parity_results,
    publish,
)
from diffoundry.cli.console import console, print_json
from diffoundry.cli.gains import lines as gain_lines, refuse_idle_gate, with_gains
from diffoundry.cli.progress import LiveReporter, plain_reporter
from diffoundry.discovery import retraces
from diffoundry.errors import ExitCode, UsageError, worst
from diffoundry.memory import said
from diffoundry.planning.planner import make_plan
from diffoundry.types import ParityResult


@dataclass(frozen=True)
class Summary:
    """What a build came to."""

    exit_code: ExitCode
    publication: Publication | None
    outcomes: Mapping[str, Outcome]
    seconds: float


def only_profile(given: Sequence[str]) -> str:
    """The one profile. Raises UsageError for several: the command line would forget all but one."""
    if len(given) > 1:
        names = ", ".join(f'"{one}"' for one in given)
        raise UsageError(
            "--profile", expected="one profile", found=" and ".join(given),
            remedy=f"build them in turn, or into one bundle by a profile with include = [{names}]",
        )  # fmt: skip
    return given[0]


def run_build(
    *,
    model: str | None,
    profile: str,
    out: Path,
    components: tuple[str, ...],
    revision: str | None,
    dry_run: bool,
    use_cache: bool,
    jobs: int,
    as_json: bool,
    full: bool = False,
    require_gain: float | None = None,
    drift_budget_db: float | None = None,
    memory_budget: int | None = None,
    preview_vae: Path | None = None,
) -> ExitCode:
    """Run the command; returns the exit code. Raises DiffoundryError for bad input."""
    started = time.perf_counter()
    plan = make_plan(model, profile, components, revision, drift_budget_db, preview_vae)
    refuse_idle_gate(plan, require_gain)
    if not dry_run:
        check_output_folder(out)
    with _store(use_cache) as store:
        rows = Driver(plan, store).dry_run() if dry_run or memory_budget else []
        refuse_what_cannot_fit(rows, memory_budget)
        if dry_run:
            return _print_dry_run(rows, as_json)
        with _reporter(len(plan.nodes), as_json) as report:
            for left_out in plan.source.left_out:
                report(Event("note", None, f"left out: {left_out}"))
            store.report = lambda line: report(Event("note", None, line))
            driver = Driver(plan, store, report, jobs, memory_budget=memory_budget)
            outcomes = driver.run()
            publication = None
            if plan.whole:
                judged = with_gains(
                    driver,
                    judge(driver),
                    out,
                    require_gain,
                    say=lambda line: report(Event("note", None, line)),
                )
                publication = publish(driver, out, judged)
        summary = Summary(
            _exit_code(outcomes, publication),
            publication,
            outcomes,
            time.perf_counter() - started,
        )
        _print_summary(driver, summary, as_json, full)
    return summary.exit_code


@contextlib.contextmanager
def _store(use_cache: bool) -> Iterator[Store]:
    """The user's store; without the cache, an empty one that is thrown away."""
    if use_cache:
        yield Store()
        return
    root = default_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="no-cache-") as folder:
        yield Store(Path(folder))


@contextlib.contextmanager
def _reporter(total: int, as_json: bool) -> Iterator[Report]:
    if as_json:
        yield lambda event: None
    elif sys.stdout.isatty():
        with LiveReporter(total) as live:
            yield live
    else:
        yield plain_reporter()


def _exit_code(outcomes: Mapping[str, Outcome], publication: Publication | None) -> ExitCode:
    codes = [o.error.exit_code for o in outcomes.values() if o.status == "failed" and o.error]
    if publication is not None:
        codes += [variant.exit_code for variant in publication.variants]
    code = worst(codes)
    return ExitCode.DONE if code == ExitCode.DEFERRED else code  # deferred is said, not failed


def _print_dry_run(rows: list[PlannedRow], as_json: bool) -> ExitCode:
    if as_json:
        print_json(
            [
                {
                    "id": row.node.id,
                    "component": row.node.component,
                    "stage": row.node.stage,
                    "key": row.key,
                    "status": row.status,
                    "key_is_final": row.final,
                    "expected_peak_bytes": row.node.expected_peak,
                }
                for row in rows
            ]
        )
        return ExitCode.DONE
    from rich.table import Table

    headings = ("stage", "key", "in the store", "expected peak")
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        key = row.key.removeprefix("sha256:")[:16] + ("" if row.final else " (provisional)")
        table.add_row(row.node.title, key, row.status, said(row.node.expected_peak))
    console().print(table)
    if not all(row.final for row in rows):
        console().print(
            "provisional: an input is not made yet; the key may change with its bytes",
            style="dim",
        )
    return ExitCode.DONE


def summary_document(driver: Driver, summary: Summary) -> dict[str, Any]:
    """The `--json` document of a build."""
    publication = summary.publication
    return {
        "exit_code": int(summary.exit_code),
        "seconds": round(summary.seconds, 2),
        "bundle": publication.as_json() if publication else None,
        "retraced": _retraced(summary),
        "stages": [
            {
                "id": outcome.node.id,
                "component": outcome.node.component,
                "stage": outcome.node.stage,
                "key": outcome.key,
                "status": outcome.status,
                "seconds": outcome.entry.seconds if outcome.entry else None,
                "peak_memory_bytes": outcome.entry.peak_memory_bytes if outcome.entry else None,
                "error": outcome.error.as_json() if outcome.error else None,
            }
            for outcome in summary.outcomes.values()
        ],
    }


def _print_summary(driver: Driver, summary: Summary, as_json: bool, full: bool) -> None:
    if as_json:
        print_json(summary_document(driver, summary))
        return
    from diffoundry.cli.tables import parity_notes, parity_table, stage_table

    out = console()
    made = [o for o in summary.outcomes.values() if o.status == "done"]
    if made:
        out.print(stage_table(made))
    if summary.publication is None:
        out.print("only some components were built: nothing is published", highlight=False)
    for name, results in _parity_results(driver, summary).items():
        out.print(parity_table(results, title=f"parity of {name}", full=full))
        for line in parity_notes(results):
            out.print(line, highlight=False, markup=False)
    if summary.publication is not None:
        said = [*gain_lines(summary.publication.variants), *summary.publication.lines()]
        for line in said:
            out.print(line, highlight=False, markup=False)
    retraced = _retraced(summary)
    if retraced:
        told = ", ".join(f"{stage} {count} times" for stage, count in retraced.items())
        out.print(f"traced once more by the converter itself: {told}", highlight=False)
    hits = sum(o.status == "hit" for o in summary.outcomes.values())
    out.print(
        f"{len(made)} stages run, {hits} from the store, {summary.seconds:.1f} s",
        highlight=False,
    )


def _retraced(summary: Summary) -> dict[str, int]:
    """Stage -> how many components its converter traced by itself, beside the shared export."""
    made = [o.node.stage for o in summary.outcomes.values() if o.status in ("done", "hit")]
    return {stage: made.count(stage) for stage in sorted(set(made)) if retraces(stage)}


def _parity_results(driver: Driver, summary: Summary) -> dict[str, tuple[ParityResult, ...]]:
    """Variant -> the results of its checks that ran."""
    if summary.publication is not None:
        return {variant.name: variant.results for variant in summary.publication.variants}
    return {v.request.name: parity_results(driver, v) for v in driver.plan.variants}
