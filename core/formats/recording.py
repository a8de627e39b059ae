"""The `recording` format: what the PyTorch original computes, kept as golden vectors.

A recording is a folder with `recording.json` (structure, canonical JSON) and
`tensors.safetensors` (arrays; equal arrays are stored once). Reading needs numpy and the
safetensors package only, and pages arrays in as they are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.formats import canonical
from diffoundry.formats.arrays import attach, detach, open_tensors
from diffoundry.types import Array, Contract

SCHEMA = "diffoundry.recording/1.0"
STRUCTURE_FILE = "recording.json"
TENSORS_FILE = "tensors.safetensors"
FLOOR_MULTIPLE = 20.0
"""A swap decides only where the reference's change is at least this many times the floor."""


@dataclass(frozen=True)
class Call:
    """One call of a component: `feeds` and `outputs` as its contract names and shapes them.

    `shape` holds the axis values. `prompt` is the prompt of the trajectory that the values come
    from ("" where there is none).
    """

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    shape: Mapping[str, int]
    prompt: str


@dataclass(frozen=True)
class ShapeCall(Call):
    """A reference call at a declared shape, or (`traced` False) at one that is never traced."""

    traced: bool
    floors: Mapping[str, Mapping[str, Floor]] = field(default_factory=dict)
    """Precision -> output -> Floor of this call alone: larger shapes round more."""


@dataclass(frozen=True)
class Effect:
    """Size of the change that a swap makes in one output: largest value, and root mean square."""

    max_abs: float
    rms: float


@dataclass(frozen=True)
class Floor:
    """How far a lossless engine of one precision may be from the reference by rounding alone.

    Worst over the sampled calls. `sqnr_db` is capped at 300.
    """

    max_abs: float
    mean_abs: float
    rms: float
    sqnr_db: float


@dataclass(frozen=True)
class Swap:
    """One input of the recording's `bases[base]` exchanged for another value; the rest stays.

    `feeds` are all inputs of the changed call, `outputs` what the reference makes of them.

    status "real": the value was recorded in another call.
    status "enlarged": a wider legal value; `value` says which.
    status "no_influence": real and enlarged values were tried, and not even float64 shows a
    change; `outputs` are the base call's.

    An input has one or two swaps: the largest real one, and an enlarged one where the real one
    is too small to decide at fp32 or fp16 (see `decides`).
    `effect` is the largest `max_abs` of `effects`, which holds every output's change.
    """

    input: str
    base: int
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    status: Literal["real", "enlarged", "no_influence"]
    effect: float
    effects: Mapping[str, Effect]
    value: str

    def decides(self, floors: Mapping[str, Floor]) -> tuple[str, ...]:
        """The outputs whose change is at least FLOOR_MULTIPLE times its floor (both as RMS).

        RMS, because cosine and norm of the change are limited: noise of 1/20 of its RMS moves
        its norm by at most 5 %.
        """
        return tuple(
            name
            for name, effect in self.effects.items()
            if effect.rms > 0 and effect.rms >= FLOOR_MULTIPLE * floors[name].rms
        )


@dataclass(frozen=True)
class ComponentRecording:
    """Everything a check of one component needs. `floors` is precision -> output -> Floor.

    `left_out`: declared shapes that are too much work to visit in a build of a large model.
    """

    contract: Contract
    calls: tuple[Call, ...]
    swaps: tuple[Swap, ...]
    shape_calls: tuple[ShapeCall, ...]
    floors: Mapping[str, Mapping[str, Floor]]
    left_out: tuple[Mapping[str, int], ...] = ()

    @property
    def bases(self) -> tuple[Call, ...]:
        """What swaps may start from: the trajectories' calls, then those at other shapes."""
        return (*self.calls, *self.shape_calls)

    def swaps_of(self, name: str) -> tuple[Swap, ...]:
        """The swaps of one input, real before enlarged."""
        return tuple(swap for swap in self.swaps if swap.input == name)


@dataclass(frozen=True)
class Trajectory:
    """One picture made by the PyTorch original with diffusers' own scheduler.

    `initial_latents` [batch, C, h, w] float32 is unit normal noise (before the scheduler's
    init_noise_sigma). `noise` [calls of the model, batch, C, h, w] float32 is the noise injected at
    each (None: the scheduler uses none). `final_latents` [batch, C, h, w] float32 is as the
    loop leaves it, before scaling for the decoder. `image` [batch, H, W, 3] float32 in [0, 1].
    """

    prompt: str
    negative: str
    seed: int
    scheduler: str
    steps: int
    guidance: float
    shape: Mapping[str, int]
    initial_latents: Array
    noise: Array | None
    final_latents: Array
    image: Array


@dataclass(frozen=True)
class PipelineRecording:
    """The trajectories of a pipeline. `notes` are warnings, such as a flat reference image."""

    trajectories: tuple[Trajectory, ...]
    split: str
    notes: tuple[str, ...] = ()


Recording = ComponentRecording | PipelineRecording
T = TypeVar("T")
R = TypeVar("R", ComponentRecording, PipelineRecording)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of `items` (calls, most often), evenly spread, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def save(recording: Recording, folder: Path) -> None:
    """Write `recording` into `folder` (made if absent). The same arrays give the same bytes."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Array] = {}
    names: dict[str, str] = {}
    structure = detach(recording, arrays, names)
    save_file(arrays, folder / TENSORS_FILE)
    document = {
        "schema": SCHEMA,
        "kind": "component" if isinstance(recording, ComponentRecording) else "pipeline",
        "tensors_digest": canonical.sha256_file(folder / TENSORS_FILE),
        "recording": structure,
    }
    (folder / STRUCTURE_FILE).write_bytes(canonical.canonical_json(document))


def load(folder: Path) -> Recording:
    """Read a recording of either kind. Raises ArtifactError where it is damaged."""
    document = _read_structure(folder)
    return _parse(folder, document)


def load_component(folder: Path) -> ComponentRecording:
    """Read a component's recording. Raises ArtifactError (damaged, or a pipeline's)."""
    return _of_kind(folder, ComponentRecording)


def load_pipeline(folder: Path) -> PipelineRecording:
    """Read a pipeline's recording. Raises ArtifactError (damaged, or a component's)."""
    return _of_kind(folder, PipelineRecording)


def validate(folder: Path) -> None:
    """Check bytes, structure and every array of a recording. Raises ArtifactError."""
    document = _read_structure(folder)
    found = canonical.sha256_file(_file(folder, TENSORS_FILE))
    if found != document["tensors_digest"]:
        raise _damaged(folder / TENSORS_FILE, str(document["tensors_digest"]), found)
    recording = _parse(folder, document)
    if isinstance(recording, PipelineRecording):
        _check_trajectories(folder, recording)
        return
    contract = recording.contract
    try:
        for call in (*recording.calls, *recording.shape_calls):
            shape = contract.check_feeds(call.feeds)
            contract.check_outputs(call.outputs, shape)
        for swap in recording.swaps:
            contract.check_outputs(swap.outputs, contract.check_feeds(swap.feeds))
    except ContractError as error:
        raise _damaged(folder, "arrays that fit the contract", str(error)) from error
    if any(not 0 <= swap.base < len(recording.bases) for swap in recording.swaps):
        raise _damaged(folder, f"swaps based on one of {len(recording.bases)} calls", "another")


def digest(folder: Path) -> str:
    """Digest of the folder's contents (recordings are written canonically)."""
    return canonical.tree_digest(folder)


def size_bytes(folder: Path) -> int:
    """Size of all files of the recording."""
    return canonical.tree_size_bytes(folder)


def _read_structure(folder: Path) -> dict[str, Any]:
    path = _file(folder, STRUCTURE_FILE)
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, "JSON", str(error)) from error
    wanted = {"schema", "kind", "tensors_digest", "recording"}
    if not isinstance(document, dict) or not wanted <= document.keys():
        raise _damaged(path, f"an object with {sorted(wanted)}", "something else")
    if str(document["schema"]).rpartition(".")[0] != SCHEMA.rpartition(".")[0]:
        raise _damaged(path, SCHEMA, str(document["schema"]))
    return document


def _of_kind(folder: Path, kind: type[R]) -> R:
    recording = load(folder)
    if not isinstance(recording, kind):
        raise _damaged(folder, kind.__name__, type(recording).__name__)
    return recording


def _parse(folder: Path, document: Mapping[str, Any]) -> Recording:
    from pydantic import ValidationError

    read = open_tensors(_file(folder, TENSORS_FILE))
    try:
        content = attach(document["recording"], read)
        if document["kind"] == "component":
            return canonical.parse(ComponentRecording, content)
        return canonical.parse(PipelineRecording, content)
    except ValidationError as error:
        kind = f"the recording of a {document['kind']}"
        raise _damaged(folder / STRUCTURE_FILE, kind, str(error)) from error


def _check_trajectories(folder: Path, recording: PipelineRecording) -> None:
    for number, trajectory in enumerate(recording.trajectories):
        latents, noise = trajectory.initial_latents, trajectory.noise
        fits = trajectory.final_latents.shape == latents.shape and trajectory.image.ndim == 4
        if noise is not None:
            fits = fits and noise.shape[1:] == latents.shape
        if not fits:
            raise _damaged(folder, "latents, noise and image that fit together", f"#{number}")


def _file(folder: Path, name: str) -> Path:
    path = canonical.inside(folder, name)
    if not path.is_file():
        raise _damaged(path, "a file", "nothing")
    return path


def _damaged(path: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"recording {path}",
        expected=expected,
        found=found,
        remedy="run the build again (a recording is made by its capture stage), or get the "
        "bundle again from whoever made it",
    )
