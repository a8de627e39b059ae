"""The bench itself: every measurement in turn, over the same contenders."""

from __future__ import annotations

import contextlib
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.compression import read_compression
from diffoundry.benching import measuring, quality, seeing
from diffoundry.benching.alone import Order, measure_alone
from diffoundry.benching.contenders import Absent, Contender, Entry, enter, open_contender
from diffoundry.benching.energy import find_meter
from diffoundry.benching.request import PictureTask, Request, picture_task
from diffoundry.benching.result import Result, Row, fill_ratios, noise_notes
from diffoundry.benching.verdicts import fill_verdicts, said_by_the_build, traits_of
from diffoundry.choosing import refuse_changed_files
from diffoundry.errors import ModelError
from diffoundry.formats import recording
from diffoundry.generation import PICTURE_COMPONENTS
from diffoundry.quality.metrics import Metrics, open_metrics
from diffoundry.types import Array

Say = Callable[[str], None]
# What torch.compile raises where it lacks a compiler or meets code that it does not take.
COMPILE_ERRORS = (RuntimeError, OSError, subprocess.SubprocessError)


def bench(
    bundle: Bundle,
    request: Request,
    variants: tuple[str, ...] = (),
    say: Say = lambda line: None,
) -> Result:
    """Measure everything that runs here. Writes nothing.

    `variants`: only these. Raises BundleError (unknown variant, changed files), UsageError (more
    pairs than there are), ModelError (another model than the bundle's), or a runtime's own error
    where no variant can run.
    """
    refuse_changed_files(bundle)
    task = picture_task(bundle)
    exam = None
    if request.pairs is not None:
        exam = quality.exam_of(bundle, request.pairs, request.metrics, task)
    metrics = open_metrics(request.metrics)
    entries, absent = enter(bundle, request, variants)
    rows = [Row(entry) for entry in entries]
    feeds = _recorded_feeds(bundle)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # PyTorch's and diffusers' hints to their developers
        contenders = _open_all(bundle, rows, absent, task, feeds, request, stack, say)
        rows = [row for row in rows if row.entry.name in contenders]
        notes, energy = _time(contenders, rows, task, feeds, request, say)
        _read_back(contenders, rows)
        if exam is not None:
            _examine(contenders, rows, exam, metrics, say)
    if request.pairs is not None:
        notes += seeing.said_of(rows, exam, metrics)
    notes += _measure_alone(bundle, rows, task, request.threads, say)
    notes += noise_notes(rows)
    fill_ratios(rows)
    fill_verdicts(rows, traits_of(bundle.manifest.variants))
    notes += said_by_the_build(bundle, rows)
    return Result(bundle.digest, request, task, tuple(rows), tuple(absent), energy, tuple(notes))


def _open_all(
    bundle: Bundle,
    rows: Sequence[Row],
    absent: list[Absent],
    task: PictureTask,
    feeds: measuring.Feeds,
    request: Request,
    stack: contextlib.ExitStack,
    say: Say,
) -> dict[str, Contender]:
    """Open every row's contender; those that turn out not to fit go to `absent`."""
    contenders = {}
    foreign = ""
    for row in rows:
        entry = row.entry
        if foreign and entry.model is not None:
            absent.append(Absent(entry.name, foreign))
            continue
        say(f"{entry.name}: opening")
        try:
            opened = open_contender(bundle, entry, task, request.threads, tuple(feeds))
            stack.callback(opened.close)
            why = _prepare(bundle, opened, feeds, say)
            row.size_bytes = _file_sizes(bundle, entry)
            if entry.model is None:
                row.compression = read_compression(bundle, bundle.manifest.variant(entry.name))
        except ModelError as error:
            # A folder that was not named may be of another version than the bundle.
            if request.model is not None:
                raise
            why = foreign = str(error)
        if why:
            absent.append(Absent(entry.name, why))
        else:
            contenders[entry.name] = opened
    return contenders


def _file_sizes(bundle: Bundle, entry: Entry) -> Mapping[str, int]:
    if entry.model is None:
        engines = bundle.manifest.variant(entry.name).engines
        return {name: engines[name].size_bytes for name in PICTURE_COMPONENTS if name in engines}
    from diffoundry.benching.pytorch import weight_bytes

    return weight_bytes(bundle, entry.model)


def _recorded_feeds(bundle: Bundle) -> measuring.Feeds:
    """Component -> the inputs of its first recorded call."""
    return {
        name: recording.load_component(bundle.golden(name)).calls[0].feeds
        for name in bundle.manifest.contracts
    }


def _prepare(bundle: Bundle, opened: Contender, feeds: measuring.Feeds, say: Say) -> str:
    """Check the original, compile what is to be compiled; why it cannot take part, or ""."""
    entry = opened.entry
    if entry.kind == "eager" and entry.model is not None:
        from diffoundry.benching.pytorch import check_same_model

        check_same_model(bundle, entry.model, opened.sessions)
    if entry.kind != "compiled":
        return ""
    say(f"{entry.name}: compiling, which takes a minute or more")
    try:
        for name, session in opened.sessions.items():
            measuring.component_call(session, feeds[name])(0)
    except COMPILE_ERRORS as error:
        lines = str(error).strip().splitlines()
        return f"it cannot compile here: {type(error).__name__}: {lines[0] if lines else ''}"
    return ""


def _time(
    contenders: Mapping[str, Contender],
    rows: Sequence[Row],
    task: PictureTask,
    feeds: measuring.Feeds,
    request: Request,
    say: Say,
) -> tuple[list[str], str]:
    """Every timing; returns what was left out and where energy figures come from."""
    meter, energy = find_meter()
    say(f"{request.rounds} rounds of whole pictures, {len(contenders)} contenders in turn")
    measuring.time_pictures(contenders, rows, request.rounds, meter)
    say(f"{request.rounds} rounds of each component: {', '.join(feeds)}")
    measuring.time_components(contenders, rows, feeds, request.rounds)
    rounds = (request.rounds + 1) // 2
    say(f"{rounds} rounds of batches: {', '.join(map(str, request.batches))}")
    notes = measuring.time_batches(contenders, rows, task, request.batches, rounds)
    return notes, energy


def _read_back(contenders: Mapping[str, Contender], rows: Sequence[Row]) -> None:
    """Of quantized components: how many planned layers the runtime ran in integer kernels."""
    for row in rows:
        sessions = contenders[row.entry.name].sessions
        for component, one in row.compression.items():
            if one.integer_modules and component in sessions:
                used = sessions[component].precision_used().get("integer_layers")
                if used is not None:
                    row.integer_layers[component] = len(one.integer_modules & set(used))


def _examine(
    contenders: Mapping[str, Contender],
    rows: Sequence[Row],
    exam: quality.Exam,
    metrics: Metrics,
    say: Say,
) -> None:
    """What PyTorch eager's and every variant's pictures show, each against the first of them."""
    answers: dict[str, quality.Answers] = {}
    differences: dict[str, dict[str, float]] = {}
    first: list[Array | None] = []
    sights = seeing.Sights(metrics, exam)
    for row in rows:
        pipeline = contenders[row.entry.name].pipeline
        if row.entry.kind not in ("eager", "engine") or pipeline is None:
            continue
        say(f"{row.entry.name}: {len(exam.pairs)} pictures at {exam.steps} steps, judged")
        pictures = list(quality.paint(pipeline, exam))
        if exam.judge is not None:
            answers[row.entry.name] = quality.answer(exam.judge, pictures)
            first = first or pictures
            differences[row.entry.name] = quality.picture_differences(first, pictures)
        row.metrics = sights.look(row.entry.name, pictures)
    paired = quality.compare(next(iter(answers)), answers) if answers else {}
    for row in rows:
        if row.entry.name in answers:
            found = answers[row.entry.name].as_json()
            other = row.entry.name in paired
            row.quality = {
                **found,
                "steps": exam.steps,
                "paired": paired.get(row.entry.name),
                "image_psnr_db": differences[row.entry.name] if other else None,
            }


def _measure_alone(
    bundle: Bundle, rows: Sequence[Row], task: PictureTask, threads: int, say: Say
) -> list[str]:
    """Memory of each contender in a fresh process; returns what could not be measured."""
    notes = []
    for row in rows:
        say(f"{row.entry.name}: opened in a process of its own, for its memory")
        row.alone = measure_alone(Order(bundle.path, row.entry, task, threads))
        if row.alone.problem:
            notes.append(f"memory of {row.entry.name} is not known: {row.alone.problem}")
    return notes
