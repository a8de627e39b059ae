"""A network with everything that the rules rewrite, and the stage run on it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.exporters.fuse_onnx import FuseOnnx
from diffoundry.exporters.onnx_from_exported_program import write_fp32
from diffoundry.exporters.quantize_onnx import QuantizeOnnx
from diffoundry.formats import onnx, quant_plan
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range
from diffoundry.runtimes.onnx_session import OnnxSession
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

WIDE = 128
BATCH = AxisRef("batch")
EDGE = (BATCH, 4, AxisRef("height"), AxisRef("width"))
CONTRACT = Contract(
    "unet",
    (
        TensorSpec("sample", "float32", EDGE),
        TensorSpec("context", "float32", (BATCH, 5, 16)),
    ),
    (TensorSpec("model_output", "float32", EDGE),),
    (Axis("batch", 1, 1, 4), Axis("height", 6, 32, 64, 2), Axis("width", 6, 32, 64, 2)),
)
# The second: nothing is a whole number of tiles, at any depth.
SHAPES = ({"batch": 1, "height": 32, "width": 32}, {"batch": 3, "height": 14, "width": 38})


class _Attention(torch.nn.Module):
    def __init__(self, width: int, taken: int) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(width, width)
        self.to_k = torch.nn.Linear(taken, width, bias=False)
        self.to_v = torch.nn.Linear(taken, width)
        self.to_out = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        query, key, value = (
            t.view(batch, -1, 4, WIDE // 4).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(words), self.to_v(words))
        )
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(found.transpose(1, 2).reshape(batch, -1, WIDE))


class _Network(torch.nn.Module):
    """Convolutions on large, small and enlarged planes; attention to itself and to a context."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, WIDE, 3, padding=1)
        self.large = torch.nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.down = torch.nn.Conv2d(WIDE, WIDE, 3, stride=2, padding=1)
        self.small = torch.nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDE) for _ in range(3))
        self.self_attention = _Attention(WIDE, WIDE)
        self.cross_attention = _Attention(WIDE, 16)
        self.gate = torch.nn.Linear(WIDE, 2 * WIDE)
        self.up = torch.nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(WIDE, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = self.large(torch.nn.functional.silu(self.conv_in(sample)))
        x = self.small(torch.nn.functional.silu(self.down(x)))
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norms[0](tokens)
        tokens = self.self_attention(normed, normed) + tokens
        tokens = self.cross_attention(self.norms[1](tokens), context) + tokens
        plain, gate = self.gate(self.norms[2](tokens)).chunk(2, dim=-1)
        tokens = plain * torch.nn.functional.gelu(gate) + tokens
        x = tokens.transpose(1, 2).reshape(x.shape)
        x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv_out(torch.nn.functional.silu(self.up(x)))


@functools.cache
def network() -> torch.nn.Module:
    """Seeded, in eval mode, without gradients, its values of ordinary size. Don't change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _Network().eval().requires_grad_(False)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (1.5 / parameter[0].numel()) ** 0.5)
        return made


def feeds_at(shape: dict[str, int], seed: int = 0) -> dict[str, Array]:
    """Ordinary inputs at one shape."""
    random = np.random.default_rng(seed)
    return {s.name: random.standard_normal(s.shape(shape)).astype(np.float32)
            for s in CONTRACT.inputs}  # fmt: skip


def infer(artifact: Artifact, feeds: dict[str, Array]) -> Array:
    """What onnxruntime computes."""
    opened = OnnxSession().open(artifact, CONTRACT, "cpu", 1)
    return opened.infer(feeds)["model_output"]


def new_folder() -> Path:
    """A folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def fp32() -> Artifact:
    """The network as it is exported. Don't change it."""
    folder = new_folder()
    write_fp32(trace(network(), CONTRACT), CONTRACT, folder, 18, 10**9)
    onnx.canonicalise(folder)
    return Artifact(ArtifactType("onnx", "fp32"), folder, "sha256:0", "unet")


def fuse(
    model: Artifact | None = None, said: list[str] | None = None, **options: object
) -> Artifact:
    """The stage, run in a folder of its own. `said` takes what it reports."""
    model = model or fp32()
    say = said.append if said is not None else lambda line: None
    context = StageContext(new_folder(), "unet", CONTRACT, threads=1, say=say)
    stage = FuseOnnx(precision=model.type.precision, **options)  # type: ignore[arg-type]
    made = stage.run({"model": model}, context)["model"]
    return Artifact(model.type, made.path, "sha256:0", "unet")


@functools.cache
def int8() -> Artifact:
    """The network's linear layers and one convolution in INT8, in the integer form."""
    entries, tensors = [], {}
    for name, layer in network().named_modules():
        linear = isinstance(layer, torch.nn.Linear)
        if not linear and name != "large":
            continue
        entries.append(
            LayerPlan(name, "linear" if linear else "conv", "static", activation=Range(-5, 5))
        )
        weight = layer.weight.detach().numpy()  # type: ignore[operator,union-attr]
        peak = np.abs(weight).reshape(weight.shape[0], -1).max(1)
        tensors[f"{name}.weight_scale"] = (peak / 127).astype(np.float32)
    folder = new_folder()
    quant_plan.save(folder / "plan", QuantPlan("unet", "test", {}, tuple(entries), tensors))
    context = StageContext(folder / "work", "unet", CONTRACT, threads=1)
    context.work.mkdir()
    plan = Artifact(ArtifactType("quant_plan"), folder / "plan", "sha256:0", "unet")
    made = QuantizeOnnx().run({"model": fp32(), "plan": plan}, context)["model"]
    return Artifact(ArtifactType("onnx", "int8"), made.path, "sha256:0", "unet")
