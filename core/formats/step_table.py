"""The step_tables kind: a folder with one `<scheduler>.safetensors` a scheduler.

A table says how a scheduler turns noise into a latent: at which timesteps the model is called,
how its input is scaled, and of what the next latent is made. The layout, for readers in other
languages, and the loop that runs it are in docs/step-tables.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffoundry.errors import ArtifactError, ModelError, UsageError
from diffoundry.formats.canonical import canonical_json, tree_digest, tree_size_bytes
from diffoundry.formats.safetensors_file import read_header
from diffoundry.types import Array

KIND = "step_tables"
SCHEMA = "diffoundry.step_tables/1.0"
SUFFIX = ".safetensors"
PARTS = ("calls", "latents", "outputs")


@dataclass(frozen=True)
class StepTable:
    """One scheduler at one number of steps. Arrays are float32.

    timesteps: [calls], what the model is told. input_scales: [calls], the latent is multiplied
    by these before the model sees it. latent_coefficients, output_coefficients: [calls, history];
    column j belongs to the latent (model output) of j calls ago, column 0 to the current one.
    noise_coefficients: [calls], zero where no noise is added. `calls` is larger than `steps`
    for schedulers that call the model more often (PNDM).
    """

    scheduler: str
    steps: int
    init_noise_sigma: float
    timesteps: Array
    input_scales: Array
    latent_coefficients: Array
    output_coefficients: Array
    noise_coefficients: Array

    @property
    def calls(self) -> int:
        """How often the model is called."""
        return len(self.timesteps)

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.noise_coefficients.any())


@dataclass(frozen=True)
class SchedulerTables:
    """All tables of one scheduler by number of steps.

    `settings` is the diffusers class and configuration that they were probed from, for the
    record. `left_out` says why a count of the range has no table.
    """

    scheduler: str
    default: bool
    tables: Mapping[int, StepTable]
    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)


def save(tables: SchedulerTables, folder: Path) -> Path:
    """Write `<scheduler>.safetensors` into `folder`; equal tables give equal bytes."""
    import numpy as np
    from safetensors.numpy import save as to_bytes

    tensors: dict[str, Array] = {}
    for steps, table in sorted(tables.tables.items()):
        columns = (table.timesteps, table.input_scales, table.noise_coefficients)
        tensors[f"{steps}.calls"] = np.stack(columns, axis=1).astype(np.float32)
        tensors[f"{steps}.latents"] = np.ascontiguousarray(table.latent_coefficients, np.float32)
        tensors[f"{steps}.outputs"] = np.ascontiguousarray(table.output_coefficients, np.float32)
    description = {
        "schema": SCHEMA,
        "scheduler": tables.scheduler,
        "default": tables.default,
        "init_noise_sigma": {str(s): t.init_noise_sigma for s, t in tables.tables.items()},
        "left_out": {str(steps): why for steps, why in tables.left_out.items()},
        "settings": tables.settings,
    }
    path = folder / f"{tables.scheduler}{SUFFIX}"
    # One metadata entry: safetensors writes several in no fixed order.
    metadata = {"step_tables": canonical_json(description).decode()}
    # Not save_file, which leaves the file readable by its owner alone.
    path.write_bytes(to_bytes(tensors, metadata))
    return path


@dataclass(frozen=True)
class TableFolder:
    """An opened folder of step tables; tables are read one at a time, when asked for."""

    path: Path
    descriptions: Mapping[str, Mapping[str, Any]]

    @property
    def schedulers(self) -> tuple[str, ...]:
        """The schedulers that are there, the default one first."""
        return tuple(sorted(self.descriptions, key=lambda name: (name != self.default, name)))

    @property
    def default(self) -> str:
        """The scheduler to use when none is named."""
        return next(name for name, one in self.descriptions.items() if one["default"])

    def counts(self, scheduler: str | None = None) -> tuple[int, ...]:
        """The step counts there are for `scheduler`. Raises UsageError for an unknown one."""
        description = self.descriptions[self._known(scheduler)]
        return tuple(sorted(int(steps) for steps in description["init_noise_sigma"]))

    def load(self, scheduler: str | None, steps: int) -> StepTable:
        """The table for `steps` steps of `scheduler` (None: the default one).

        Raises UsageError for a scheduler or count that is not there, with those that are.
        """
        name = self._known(scheduler)
        counts = self.counts(name)
        if steps not in counts:
            why = self.descriptions[name]["left_out"].get(str(steps), str(steps))
            raise UsageError(
                f"{steps} steps of {name}",
                expected=f"{describe_counts(counts)} steps",
                found=why,
                remedy="choose a number of steps in this range",
            )
        return _read(self.path / f"{name}{SUFFIX}", name, steps, self.descriptions[name])

    def _known(self, scheduler: str | None) -> str:
        if scheduler is None:
            return self.default
        if scheduler not in self.descriptions:
            raise UsageError(
                f"scheduler {scheduler!r}",
                expected=f"one of {', '.join(self.schedulers)}",
                found=scheduler,
                remedy="name a scheduler that this model has step tables for",
            )
        return scheduler


def open_tables(folder: Path) -> TableFolder:
    """Open a folder of step tables. Raises ArtifactError when something in it is damaged."""
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    descriptions = {path.stem: _describe(path) for path in paths}
    defaults = [name for name, one in descriptions.items() if one["default"]]
    if len(defaults) != 1:
        raise _damaged(folder, f"{len(defaults)} default schedulers among {sorted(descriptions)}")
    return TableFolder(folder, descriptions)


def load(path: Path, steps: int) -> StepTable:
    """One table of one file. Raises ArtifactError (damaged) or UsageError (no such count)."""
    return TableFolder(path.parent, {path.stem: _describe(path)}).load(path.stem, steps)


def validate(folder: Path) -> None:
    """Check that every table can be read and used. Raises ArtifactError."""
    tables = open_tables(folder)
    for scheduler in tables.schedulers:
        for steps in tables.counts(scheduler):
            tables.load(scheduler, steps)


def digest(folder: Path) -> str:
    """Digest of the folder's contents."""
    return tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return tree_size_bytes(folder)


def canonicalise(folder: Path) -> None:
    """Nothing to do: `save` writes canonical bytes."""


def describe_counts(counts: Iterable[int]) -> str:
    """Counts as ranges: "1 to 8", "1 to 3, 5 to 8"."""
    runs: list[list[int]] = []
    for count in sorted(counts):
        if runs and runs[-1][-1] == count - 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _describe(path: Path) -> Mapping[str, Any]:
    """The JSON metadata of one file, its fields checked."""
    try:
        read_header(path)
    except ModelError as error:
        raise _damaged(path, error.found) from error
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    try:
        description = json.loads(header["__metadata__"]["step_tables"])
        schema = str(description["schema"])
        complete = (
            schema.rpartition(".")[0] == SCHEMA.rpartition(".")[0]
            and description["scheduler"] == path.stem
            and isinstance(description["default"], bool)
            and all(int(steps) > 0 for steps in description["init_noise_sigma"])
            and isinstance(description["left_out"], dict)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"no usable description ({error!r})") from error
    if not complete:
        raise _damaged(path, f"the description {canonical_json(description).decode()[:200]}")
    return description


def _read(path: Path, scheduler: str, steps: int, description: Mapping[str, Any]) -> StepTable:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            calls, latents, outputs = (file.get_tensor(f"{steps}.{part}") for part in PARTS)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    _check_arrays(path, steps, calls, latents, outputs)
    return StepTable(
        scheduler,
        steps,
        float(description["init_noise_sigma"][str(steps)]),
        timesteps=calls[:, 0],
        input_scales=calls[:, 1],
        noise_coefficients=calls[:, 2],
        latent_coefficients=latents,
        output_coefficients=outputs,
    )


def _check_arrays(path: Path, steps: int, calls: Array, latents: Array, outputs: Array) -> None:
    import numpy as np

    shapes = (calls.shape, latents.shape, outputs.shape)
    fits = (
        all(len(shape) == 2 and shape[0] == len(calls) for shape in shapes)
        and calls.shape[1] == 3
        and 1 <= latents.shape[1] <= len(calls)
        and 1 <= outputs.shape[1] <= len(calls)
        and len(calls) >= steps
    )
    arrays = (calls, latents, outputs)
    if not fits or not all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays):
        raise _damaged(path, f"a table for {steps} steps with shapes {shapes}, or not finite")


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"step tables {path}",
        expected=f"safetensors files that follow {SCHEMA}",
        found=found,
        remedy="build the bundle again, or get this file again from where it came",
    )
