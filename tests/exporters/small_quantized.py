"""A network with every kind of layer that a plan may name, its plans, and the stage run on it."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compression.simulator import simulated
from diffoundry.exporters.onnx_from_exported_program import write_fp32
from diffoundry.exporters.quantize_onnx import QuantizeOnnx
from diffoundry.formats import onnx, quant_plan
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range
from diffoundry.types import (
    Array,
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    StageContext,
    TensorSpec,
)

BATCH, HEIGHT, WIDTH = AxisRef("batch"), AxisRef("height", 4), AxisRef("width", 4)
CONTRACT = Contract(
    "unet",
    (
        TensorSpec("sample", "float32", (BATCH, 4, HEIGHT, WIDTH)),
        TensorSpec("input_ids", "int64", (BATCH, 5)),
    ),
    (TensorSpec("model_output", "float32", (BATCH, 4, AxisRef("height", 8), AxisRef("width", 8))),),
    (Axis("batch", 1, 1, 4), Axis("height", 8, 32, 64, 8), Axis("width", 8, 32, 64, 8)),
)
SHAPES = ({"batch": 1, "height": 32, "width": 32}, {"batch": 3, "height": 16, "width": 40})
KEPT = ("network.conv_in", "network.table", "network.positions")


class _Network(torch.nn.Module):
    """A text, looked up and attended to, and convolutions: 3×3, with a stride, 1×1, wide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 16)
        self.positions = torch.nn.Embedding(5, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.to_q = torch.nn.Linear(16, 16)
        self.to_k = torch.nn.Linear(16, 16, bias=False)
        self.to_v = torch.nn.Linear(16, 16)
        self.gate = torch.nn.Linear(16, 8)
        self.conv_in = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.down = torch.nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.wide = torch.nn.Conv2d(8, 16, (1, 5), padding=(0, 2), bias=False)
        self.point = torch.nn.Conv2d(16, 4, 1)

    def forward(self, sample: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(5)[None]
        words = self.norm(self.table(input_ids) + self.positions(ids))
        query, key = self.to_q(words), self.to_k(words)
        found = (query @ key.transpose(1, 2) / 4).softmax(-1) @ self.to_v(words)
        x = torch.nn.functional.silu(self.conv_in(sample))
        x = self.down(x) + self.gate(found.mean(1))[:, :, None, None]
        return self.point(torch.nn.functional.silu(self.wide(x)))


class _Wrapper(torch.nn.Module):
    """As the components' wrappers: names of nodes leave "network" out, a plan's do not."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _Network()

    def forward(self, sample: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return self.network(sample, input_ids)


@functools.cache
def network() -> torch.nn.Module:
    """Seeded, in eval mode, without gradients. Don't change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Wrapper().eval().requires_grad_(False)


def feeds_at(seed: int = 0, shape: dict[str, int] = SHAPES[0]) -> dict[str, Array]:
    """Ordinary inputs at one shape."""
    random = np.random.default_rng(seed)
    sample, ids = (spec.shape(shape) for spec in CONTRACT.inputs)
    return {
        "sample": random.standard_normal(sample).astype(np.float32),
        "input_ids": random.integers(0, 11, ids),
    }


def reference(feeds: dict[str, Array], plan: QuantPlan | None = None) -> Array:
    """What PyTorch computes, or, with a plan, what the plan means."""
    inputs = [torch.from_numpy(value) for value in feeds.values()]
    with torch.inference_mode():
        if plan is None:
            return network()(*inputs).numpy()
        with simulated(network(), plan):
            return network()(*inputs).numpy()


@functools.cache
def _ranges() -> dict[str, tuple[Range, Range]]:
    """Module -> range of its inputs and of its outputs on eight calls."""
    seen: dict[str, list[tuple[float, float, float, float]]] = {}
    hooks = []
    for name, layer in _layers():
        if not isinstance(layer, torch.nn.Embedding):

            def look(_: Any, given: Any, made: Any, name: str = name) -> None:
                edges = (given[0].min(), given[0].max(), made.min(), made.max())
                seen.setdefault(name, []).append(tuple(float(edge) for edge in edges))  # type: ignore[arg-type]

            hooks.append(layer.register_forward_hook(look))
    for seed in range(8):
        reference(feeds_at(100 + seed))
    for hook in hooks:
        hook.remove()
    low, high = np.min, np.max
    return {
        name: (
            Range(float(low(values, 0)[0]), float(high(values, 0)[1])),
            Range(float(low(values, 0)[2]), float(high(values, 0)[3])),
        )
        for name, values in seen.items()
    }


def _layers() -> list[tuple[str, torch.nn.Module]]:
    kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding)
    return [(n, layer) for n, layer in network().named_modules() if isinstance(layer, kinds)]


def make_plan(
    scheme: str = "static",
    outputs: bool = False,
    symmetric: bool = False,
    biases: dict[str, Array] | None = None,
) -> QuantPlan:
    """Every layer in `scheme`, but those of KEPT: only their weights."""
    entries, tensors = [], {f"{name}.bias": value for name, value in (biases or {}).items()}
    for name, layer in _layers():
        weight = layer.weight.detach().numpy()  # type: ignore[operator,union-attr]
        kind = {"Conv2d": "conv", "Linear": "linear"}.get(type(layer).__name__, "embedding")
        own = "weight_only" if name in KEPT else scheme
        given, made = _ranges().get(name, (None, None))
        entries.append(
            LayerPlan(
                name,
                kind,  # type: ignore[arg-type]
                own,  # type: ignore[arg-type]
                activation=given if own == "static" else None,
                output=made if outputs and own == "static" else None,
                symmetric=symmetric,
            )
        )
        peak = np.abs(weight).reshape(weight.shape[0], -1).max(1)
        tensors[f"{name}.weight_scale"] = (peak / 127).astype(np.float32)
    return QuantPlan("unet", "test", {}, tuple(entries), tensors)


def schemes(plan: QuantPlan) -> dict[str, str]:
    """What every INT8 layer of the plan is."""
    return {entry.module: entry.scheme for entry in plan.layers if entry.integer_weight}


def only(plan: QuantPlan, *modules: str) -> QuantPlan:
    """The plan, everything but some layers in float."""
    entries = (
        entry if entry.module in modules else dataclasses.replace(entry, scheme="float")
        for entry in plan.layers
    )
    return dataclasses.replace(plan, layers=tuple(entries))


@functools.cache
def shared_fp32() -> Artifact:
    """The network as fp32 ONNX, exported once for all tests of a process."""
    folder = _folder()
    write_fp32(trace(network(), CONTRACT), CONTRACT, folder, 18, 10**9)
    onnx.canonicalise(folder)
    return Artifact(ArtifactType("onnx", "fp32"), folder, "sha256:0", "unet")


def quantize(plan: QuantPlan, **options: Any) -> Artifact:
    """The stage, run with this plan in a folder of its own."""
    folder = _folder()
    quant_plan.save(folder / "plan", plan)
    context = StageContext(folder / "work", "unet", CONTRACT, threads=1)
    context.work.mkdir()
    plan_artifact = Artifact(ArtifactType("quant_plan"), folder / "plan", "sha256:0", "unet")
    inputs = {"model": shared_fp32(), "plan": plan_artifact}
    produced = QuantizeOnnx(**options).run(inputs, context)["model"]
    return Artifact(ArtifactType("onnx", "int8"), produced.path, "sha256:0", "unet")


def sqnr_db(exact: Array, found: Array) -> float:
    """Signal to noise."""
    noise = float(((exact - found) ** 2).sum())
    return 10 * math.log10(float((exact**2).sum()) / max(noise, 1e-30))


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
