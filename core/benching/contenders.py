"""Who takes part: every variant whose runtime is here, and PyTorch as what they are held against.

A contender is described first and opened later, so that a fresh process can open one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.manifest import VariantRecord
from diffoundry.benching.request import PictureTask, Request
from diffoundry.choosing import open_variant, runtime_problem, text_to_image
from diffoundry.embedded import SHAPES_LCM
from diffoundry.errors import DiffoundryError, worst
from diffoundry.generation import PICTURE_COMPONENTS, TextToImage
from diffoundry.runtimes.torch_eager import TorchEager
from diffoundry.sessions import CheckedSession

Kind = Literal["eager", "compiled", "diffusers", "engine"]
TITLES: Mapping[Kind, str] = {
    "eager": "PyTorch eager",
    "compiled": "torch.compile",
    "diffusers": "diffusers pipeline",
}


@dataclass(frozen=True)
class Entry:
    """One contender before it is opened. An engine's name is its variant's."""

    name: str
    kind: Kind
    device: str
    model: Path | None = None


@dataclass(frozen=True)
class Absent:
    """Who does not take part, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Contender:
    """An opened contender. `pipeline` is None for diffusers' own, which has no sessions."""

    entry: Entry
    picture: Callable[[int], object]
    """Makes the picture of the task from a seed."""
    pipeline: TextToImage | None = None
    sessions: Mapping[str, CheckedSession] = field(default_factory=dict)

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()


def is_embedded(bundle: Bundle) -> bool:
    """Whether the bundle was built from the model that Diffoundry ships, going by its name."""
    return bundle.manifest.model.name == SHAPES_LCM.name


def model_of(bundle: Bundle, model: Path | None) -> Path | None:
    """Where the PyTorch original lies: the folder given, else the embedded model where it is it."""
    if model is not None:
        return model
    return SHAPES_LCM if is_embedded(bundle) and SHAPES_LCM.is_dir() else None


def enter(
    bundle: Bundle, request: Request, names: tuple[str, ...] = ()
) -> tuple[list[Entry], list[Absent]]:
    """Every contender that can take part here, PyTorch first, and those that cannot.

    `names`: only these variants. Raises BundleError for an unknown name, and a runtime's own
    error where a named variant, or every variant, cannot run here.
    """
    engines: list[Entry] = []
    absent: list[Absent] = []
    problems: list[DiffoundryError] = []
    for variant in _chosen(bundle, names):
        problem = runtime_problem(variant)
        if problem is None:
            engines.append(Entry(variant.name, "engine", variant.device))
        else:
            absent.append(Absent(variant.name, problem.text()))
            problems.append(problem)
    if problems and (names or not engines):
        code = worst([problem.exit_code for problem in problems])
        raise next(problem for problem in problems if problem.exit_code == code)
    originals: list[Entry] = []
    for device in dict.fromkeys(entry.device for entry in engines):
        _enter_pytorch(bundle, request, device, originals, absent)
    return originals + engines, absent


def _chosen(bundle: Bundle, names: tuple[str, ...]) -> tuple[VariantRecord, ...]:
    if not names:
        return bundle.manifest.variants
    return tuple(bundle.manifest.variant(name) for name in dict.fromkeys(names))


def _enter_pytorch(
    bundle: Bundle, request: Request, device: str, entries: list[Entry], absent: list[Absent]
) -> None:
    model = model_of(bundle, request.model)
    problem = TorchEager().unavailable(device)
    where = "" if device == "cpu" else f" ({device})"
    if model is None or problem is not None:
        why = str(problem) if problem else (
            f"the folder of the model {bundle.manifest.model.name} is not known: "
            "name it with --model DIR"
        )  # fmt: skip
        absent.append(Absent(f"PyTorch{where}", why))
        return
    for kind, title in TITLES.items():
        if kind == "compiled" and not request.compiled:
            absent.append(Absent(title + where, "left out by --no-compile"))
            continue
        entries.append(Entry(title + where, kind, device, model))


def open_contender(
    bundle: Bundle,
    entry: Entry,
    task: PictureTask,
    threads: int,
    components: tuple[str, ...] = PICTURE_COMPONENTS,
) -> Contender:
    """Open one contender's `components` (at least those that a picture needs)."""
    if entry.kind == "engine":
        variant = bundle.manifest.variant(entry.name)
        sessions = open_variant(
            bundle, variant, tuple(name for name in components if name in variant.engines), threads
        )
    else:
        from diffoundry.benching import pytorch

        assert entry.model is not None
        if entry.kind == "diffusers":
            return Contender(
                entry, pytorch.diffusers_call(entry.model, entry.device, task, threads)
            )
        sessions = pytorch.open_sessions(
            bundle, entry.model, entry.device, threads, components, entry.kind == "compiled"
        )
    pipeline = text_to_image(bundle, sessions)

    def picture(seed: int) -> object:
        return pipeline.generate(
            [task.prompt],
            steps=task.steps,
            guidance=task.guidance,
            scheduler=task.scheduler,
            seed=seed,
            height=task.height,
            width=task.width,
        )

    return Contender(entry, picture, pipeline, sessions)
