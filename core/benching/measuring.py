"""The timed parts of a bench: whole pictures, components, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from diffoundry.benching.contenders import Contender
from diffoundry.benching.energy import Meter
from diffoundry.benching.request import PictureTask
from diffoundry.benching.result import Row
from diffoundry.benching.timing import Call, interleave
from diffoundry.generation import TextToImage, to_uint8
from diffoundry.parity.engine import Engine
from diffoundry.sampling.noise import draw_initial, draw_step_noise
from diffoundry.sessions import CheckedSession
from diffoundry.types import Array

Contenders = Mapping[str, Contender]
Feeds = Mapping[str, Mapping[str, Array]]
"""Component -> one recorded call's inputs."""
BATCHED = ("unet", "vae_decoder")
"""What a batch of pictures of one prompt runs as a batch."""


def time_pictures(
    contenders: Contenders, rows: Sequence[Row], rounds: int, meter: Meter | None
) -> None:
    """A whole picture, sampler included; each round's seed is the same for all."""
    calls = {name: one.picture for name, one in contenders.items()}
    timed = interleave(calls, rounds, meter)
    for row in rows:
        row.picture = timed[row.entry.name].spread
        row.rounds[""] = timed[row.entry.name].seconds
        row.joules_per_picture = timed[row.entry.name].mean_joules


def time_components(contenders: Contenders, rows: Sequence[Row], feeds: Feeds, rounds: int) -> None:
    """One call of each component on recorded inputs."""
    for component, recorded in feeds.items():
        calls = {
            name: component_call(one.sessions[component], recorded)
            for name, one in contenders.items()
            if component in one.sessions
        }
        timed = interleave(calls, rounds)
        for row in rows:
            if row.entry.name in timed:
                row.components[component] = timed[row.entry.name].spread
                row.rounds[component] = timed[row.entry.name].seconds


def component_call(session: CheckedSession, feeds: Mapping[str, Array]) -> Call:
    """A call of one component; feeds are put into the engine's own dtypes beforehand."""
    fitted = Engine(session, session.contract).fitted(feeds)
    return lambda number: session.infer(fitted)


def time_batches(
    contenders: Contenders,
    rows: Sequence[Row],
    task: PictureTask,
    batches: Sequence[int],
    rounds: int,
) -> list[str]:
    """Pictures of one prompt, several at once. Returns what was not allowed, in words."""
    refused: dict[str, list[str]] = {}
    for batch in batches:
        calls: dict[str, Call] = {}
        for name, one in contenders.items():
            if one.pipeline is None:
                continue
            problem = batch_problem(one.pipeline, task, batch)
            if problem:
                refused.setdefault(f"batch {batch} is not measured: {problem}", []).append(name)
            else:
                calls[name] = partial(make_batch, one.pipeline, task, batch)
        timed = interleave(calls, rounds, warm_ups=1)
        for row in rows:
            if row.entry.name in timed:
                row.batches[batch] = timed[row.entry.name].spread
    return [f"{words} ({', '.join(names)})" for words, names in refused.items()]


def batch_problem(pipeline: TextToImage, task: PictureTask, batch: int) -> str:
    """Why the engines do not take this batch at the task's size, or ""."""
    values = {"batch": batch, "height": task.height, "width": task.width}
    for name in BATCHED:
        session = pipeline.sessions[name]
        assert isinstance(session, CheckedSession)
        axes = session.contract.axes
        shape = {axis.name: values[axis.name] for axis in axes}
        problems = [axis.problem_with(shape[axis.name]) for axis in axes]
        found = next((problem for problem in problems if problem), "")
        if found:
            return f"{name}: {found}"
        if not session.policy.allows(shape):
            return f"{name} has {session.policy.kind} shapes without it"
    return ""


def make_batch(pipeline: TextToImage, task: PictureTask, batch: int, seed: int) -> Array:
    """`batch` pictures of the task's prompt in one pass: uint8 [batch, H, W, 3]."""
    geometry = pipeline.geometry
    sides = (task.height // geometry.vae_factor, task.width // geometry.vae_factor)
    shape = (batch, geometry.latent_channels, *sides)
    table = pipeline.tables.load(task.scheduler, task.steps)
    latents = pipeline.denoise(
        task.prompt,
        steps=task.steps,
        guidance=task.guidance,
        scheduler=task.scheduler,
        initial_latents=draw_initial(seed, shape),
        step_noise=draw_step_noise(seed, table.calls, shape) if table.needs_noise else None,
    )
    return to_uint8(pipeline.decode(latents))
