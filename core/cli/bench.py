"""`diffoundry bench`: which engines pay on this host, and what their pictures show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.store import default_root
from diffoundry.benching.quality import PAIRS, STEPS
from diffoundry.benching.request import Request, parse_batches, usual_threads
from diffoundry.benching.result import Result, Row
from diffoundry.benching.run import bench
from diffoundry.benching.saving import save_evidence
from diffoundry.benching.seeing import measured
from diffoundry.benching.timing import Spread
from diffoundry.cli.console import console, print_json
from diffoundry.errors import ExitCode, UsageError
from diffoundry.quality.metrics import TITLES, MetricFiles

if TYPE_CHECKING:
    from rich.table import Table


def run_bench(
    *,
    bundle_path: Path,
    model: Path | None,
    variants: tuple[str, ...],
    rounds: int,
    threads: int | None,
    batches: str,
    compiled: bool,
    quality: bool,
    pairs: int | None,
    metrics: MetricFiles,
    save: bool,
    as_json: bool,
) -> ExitCode:
    """Measure and print. Raises DiffoundryError for bad input or where nothing can run."""
    _refuse_without_quality(quality, pairs, metrics)
    request = Request(
        rounds=rounds,
        threads=threads or usual_threads(),
        batches=parse_batches(batches),
        model=model,
        compiled=compiled,
        pairs=(pairs or PAIRS) if quality else None,
        metrics=metrics,
    )
    progress = console(stderr=True)
    bundle = open_bundle(bundle_path, HashCache(default_root() / "digests.sqlite"))
    result = bench(
        bundle,
        request,
        variants,
        say=lambda line: None if as_json else progress.print(line, style="dim", markup=False),
    )
    written = save_evidence(bundle, result) if save else None
    if as_json:
        print_json(result.as_document())
        return ExitCode.DONE
    _print(result)
    if written is not None:
        console().print(f"written: {written}", highlight=False, markup=False)
    return ExitCode.DONE


def _refuse_without_quality(quality: bool, pairs: int | None, metrics: MetricFiles) -> None:
    given = {"pairs": pairs, "clip": metrics.clip, "lpips": metrics.lpips, "fid": metrics.fid}
    alone = [f"--{name}" for name, value in given.items() if value is not None]
    if alone and not quality:
        raise UsageError(
            ", ".join(alone),
            expected="--quality beside it",
            found=f"{' '.join(alone)} without --quality",
            remedy=f"add --quality, or leave {' and '.join(alone)} out",
        )


def _print(result: Result) -> None:
    out = console()
    task = result.task
    out.print(
        f"{task.height}×{task.width}, {task.steps} steps of {task.scheduler}, guidance "
        f"{task.guidance:g}, {result.request.threads} threads, {result.request.rounds} rounds; "
        f"{task.prompt!r}",
        highlight=False,
        markup=False,
    )
    for table in tables(result):
        out.print()
        out.print(table)
    out.print()
    for line in lines(result):
        out.print(line, highlight=False, markup=False)


def tables(result: Result) -> list[Table]:
    """Whole pictures, components, verdicts, what compression did, batches, and quality where it
    was measured."""
    found = [_picture_table(result), _component_table(result)]
    if any(row.verdict and row.verdict.gain for row in result.variants):
        found.append(_gain_table(result))
    if any(row.compression for row in result.variants):
        found.append(_compression_table(result))
    if any(row.batches for row in result.rows):
        found.append(_batch_table(result))
    if any(row.quality for row in result.rows):
        found.append(_quality_table(result))
    if any(row.metrics and measured(row.metrics) for row in result.rows):
        found.append(_metrics_table(result))
    return found


def lines(result: Result) -> list[str]:
    """What stands below the tables: verdicts, who was absent, notes."""
    judged = [(row.entry.name, row.verdict) for row in result.variants if row.verdict]
    said = [f"{name}: {verdict.text}" for name, verdict in judged]
    said += [
        f"{name}: {component}: {gain.kernels}"
        for name, verdict in judged
        for component, gain in verdict.components.items()
        if gain.kernels
    ]
    said += [f"not measured: {one.name}: {' '.join(one.why.split())}" for one in result.absent]
    energy = result.energy
    if any(row.joules_per_picture is not None for row in result.rows):
        energy = f"{energy}, of the whole package, whoever uses it"
    return [*said, f"energy: {energy}", *result.notes]


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.markup import escape

    table.add_row(*map(escape, cells))


def _picture_table(result: Result) -> Table:
    columns = ["", "median ms", "10–90 %", "× eager", "files MB", "peak MB", "first picture s"]
    energy = any(row.joules_per_picture is not None for row in result.rows)
    table = _table("a whole picture", *columns, *(["joules"] if energy else []))
    for row in result.rows:
        peak, first = row.alone.peak_memory_bytes, row.alone.first_picture_seconds
        cells = [
            row.entry.name,
            f"{row.picture.median * 1e3:.1f}" if row.picture else "",
            _range(row.picture),
            f"{row.ratio:.2f}" if row.ratio else "",
            f"{row.total_bytes / 1e6:.1f}",
            f"{peak / 1e6:.0f}" if peak else "",
            f"{first:.1f}" if first else "",
        ]
        joules = row.joules_per_picture
        _add(table, *cells, *([f"{joules:.2f}" if joules is not None else ""] if energy else []))
    return table


def _component_table(result: Result) -> Table:
    names = list(dict.fromkeys(name for row in result.rows for name in row.components))
    table = _table("a call of each component: median ms (10–90 %) × eager", "", *names)
    for row in result.rows:
        if row.components:
            _add(table, row.entry.name, *(_component_cell(row, name) for name in names))
    return table


def _component_cell(row: Row, name: str) -> str:
    spread = row.components.get(name)
    if spread is None:
        return ""
    ratio = f" {row.component_ratios[name]:.2f}" if name in row.component_ratios else ""
    return f"{spread.median * 1e3:.1f} ({_range(spread)}){ratio}"


def _gain_table(result: Result) -> Table:
    """The verdict of every component and of the picture."""
    judged = [(row.entry.name, row.verdict) for row in result.variants if row.verdict]
    names = list(dict.fromkeys(name for _, verdict in judged for name in verdict.components))
    table = _table("does it pay?", "", "against", "a picture", *names)
    for name, verdict in judged:
        if verdict.gain is not None:
            parts = [verdict.components.get(one) for one in names]
            words = [gain.word if gain else "" for gain in (verdict.gain, *parts)]
            _add(table, name, verdict.against or "", *words)
    return table


def _compression_table(result: Result) -> Table:
    """What was cut and quantized, from the bundle's own records."""
    columns = ("component", "parameters", "multiply-adds", "layers by scheme")
    table = _table("made smaller: before → after", "", *columns)
    for row in result.variants:
        for component, one in row.compression.items():
            schemes = ", ".join(f"{count} {scheme}" for scheme, count in one.layers.items())
            counts = [
                f"{change[0] / 1e6:.3g} → {change[1] / 1e6:.3g} M" if change else ""
                for change in (one.parameters, one.multiply_adds)
            ]
            _add(table, row.entry.name, component, *counts, schemes)
    return table


def _batch_table(result: Result) -> Table:
    batches = sorted({batch for row in result.rows for batch in row.batches})
    table = _table("pictures a second", "", *(f"batch {batch}" for batch in batches))
    for row in result.rows:
        if row.batches:
            through = row.throughput
            cells = [f"{through[batch]:.2f}" if batch in through else "" for batch in batches]
            _add(table, row.entry.name, *cells)
    return table


def _quality_table(result: Result) -> Table:
    columns = ("", "right", "95 %", "unreadable", "only it wrong", "only it right", "drop at most",
               "PSNR, mean", "worst")  # fmt: skip
    judged = [row for row in result.rows if row.quality]
    first = judged[0].entry.name
    count = judged[0].quality["pairs"] if judged[0].quality else 0
    table = _table(f"what {count} pictures at {STEPS} steps show, against {first}", *columns)
    for row in judged:
        found = row.quality or {}
        low, high = found["interval_95"]
        paired = found["paired"]
        cells = [""] * 5
        if paired:
            drop = f"{paired['drop_bound_95']:.1%}"
            psnr = [f"{found['image_psnr_db'][key]:.1f} dB" for key in ("mean", "worst")]
            cells = [str(paired["only_reference"]), str(paired["only_engine"]), drop, *psnr]
        accuracy = f"{found['prompt_accuracy']:.1%}"
        _add(table, row.entry.name, accuracy, f"{low:.1%}–{high:.1%}",
             str(found["abstentions"]), *cells)  # fmt: skip
    return table


def _metrics_table(result: Result) -> Table:
    rows = [(row.entry.name, row.metrics) for row in result.rows if row.metrics]
    first = rows[0][1]
    title = f"{first['pairs']} pictures at {first['steps']} steps, against {first['reference']}"
    shown = [key for key in TITLES if any(found[key] is not None for _, found in rows)]
    table = _table(title, "", *(TITLES[key][0] for key in shown))
    for name, found in rows:
        cells = ["" if found[key] is None else format(found[key], TITLES[key][1]) for key in shown]
        _add(table, name, *cells)
    return table


def _range(spread: Spread | None) -> str:
    return f"{spread.p10 * 1e3:.1f}–{spread.p90 * 1e3:.1f}" if spread else ""
