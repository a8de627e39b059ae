"""What each rule of `fuse_onnx` gains: on one block of the real size, and on whole networks.

    .venv/bin/python benchmarks/fusions.py [--no-networks] [--no-blocks] [--work FOLDER]

The networks are those of build/models/sd15-lcm (benchmarks/make_sd15_lcm.py) at 512×512, batch 1,
two threads: PyTorch eager, onnxruntime on the exported graph, onnxruntime on the fused one, called
in turn in one process. Writes Markdown to standard output (the tables of docs/fusions.md).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.exporters.fuse_onnx import RULES, FuseOnnx
from diffoundry.exporters.onnx_from_exported_program import write_fp32
from diffoundry.formats import onnx
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.types import (
    Artifact,
    ArtifactType,
    Axis,
    AxisRef,
    Contract,
    StageContext,
    TensorSpec,
)

MODEL = Path(__file__).parents[1] / "build" / "models" / "sd15-lcm"
THREADS = 2
BATCH, HEIGHT, WIDTH = AxisRef("batch"), AxisRef("height"), AxisRef("width")
AXES = (Axis("batch", 1, 1, 4), Axis("height", 8, 64, 1024, 8), Axis("width", 8, 64, 1024, 8))
# Channels in, channels out, rows and columns of what comes out, enlarged before or not.
CONVOLUTIONS = (
    (320, 320, 64, False), (640, 640, 32, False), (1280, 1280, 16, False), (1280, 1280, 8, False),
    (512, 512, 128, False), (256, 256, 256, False), (128, 128, 512, False), (64, 64, 128, False),
    (1280, 1280, 16, True), (640, 640, 64, True), (512, 512, 256, True),
)  # fmt: skip
# Tokens that ask, tokens that are asked, heads, width of a head.
ATTENTIONS = (
    (4096, 4096, 8, 40), (1024, 1024, 8, 80), (256, 256, 8, 160), (4096, 77, 8, 40),
    (4096, 4096, 1, 512),
)  # fmt: skip


class Convolution(torch.nn.Module):
    """3×3, behind an upsampler or not."""

    def __init__(self, taken: int, given: int, enlarged: bool) -> None:
        super().__init__()
        self.conv, self.enlarged = torch.nn.Conv2d(taken, given, 3, padding=1), enlarged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.enlarged:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class Attention(torch.nn.Module):
    """As diffusers writes it, without the linear layers."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        split = [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        found = torch.nn.functional.scaled_dot_product_attention(*split)
        return found.transpose(1, 2).flatten(2)


def convolution(taken: int, given: int, side: int, enlarged: bool):
    scale = 2 if enlarged else 1
    axes = (AXES[0], *(Axis(n, 8, side // scale, 1024, 8) for n in ("height", "width")))
    edge = [TensorSpec("x", "float32", (BATCH, taken, HEIGHT, WIDTH))]
    wide = (AxisRef("height", 1, scale), AxisRef("width", 1, scale))
    contract = Contract("unet", tuple(edge), (TensorSpec("y", "float32", (BATCH, given, *wide)),),
                        axes)  # fmt: skip
    title = f"{taken} → {given}, {side}×{side}" + (", enlarged" if enlarged else "")
    return title, Convolution(taken, given, enlarged), contract


def attention(asking: int, asked: int, heads: int, width: int):
    axes = (Axis("batch", 1, 1, 4), Axis("height", 8, asking, 16384, 8))
    wide = heads * width
    tokens = HEIGHT if asked == asking else asked
    inputs = (TensorSpec("q", "float32", (BATCH, HEIGHT, wide)),
              TensorSpec("k", "float32", (BATCH, tokens, wide)),
              TensorSpec("v", "float32", (BATCH, tokens, wide)))  # fmt: skip
    contract = Contract("unet", inputs, (TensorSpec("y", "float32", (BATCH, HEIGHT, wide)),), axes)
    return f"{asking} × {asked} tokens, {heads} × {width}", Attention(heads), contract


def export(module: torch.nn.Module, contract: Contract, folder: Path) -> Artifact:
    """The exported graph, unfused. A folder that is there is taken as it is."""
    if not folder.exists():
        folder.mkdir(parents=True)
        program = trace(module.eval().requires_grad_(False), contract)
        write_fp32(program, contract, folder, 18, onnx.EXTERNAL_THRESHOLD_BYTES)
        onnx.canonicalise(folder)
    return Artifact(ArtifactType("onnx", "fp32"), folder, "", contract.component)


def fuse(model: Artifact, contract: Contract, folder: Path, rules: tuple[str, ...]) -> Artifact:
    """The fused graph; how often each rule applied goes to standard error."""
    if not folder.exists():
        work = folder.with_name(f"{folder.name}.work")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        context = StageContext(work, contract.component, contract)
        FuseOnnx(rules=rules).run({"model": model}, context)["model"].path.rename(folder)
        work.rmdir()
    return Artifact(model.type, folder, "", contract.component)


def feeds_of(contract: Contract) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(0), {}
    for spec in contract.inputs:
        size = spec.shape(contract.opt_shape())
        values = random.standard_normal(size) if spec.dtype == "float32" else np.full(size, 499)
        found[spec.name] = (values if spec.name != "timestep" else np.full(size, 499)).astype(
            spec.dtype
        )
    return found


def seconds(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Of each call, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = clock()
            call()
            times[name].append(clock() - started)
    return times


def blocks(folder: Path, rounds: int, clock: Callable[[], float]) -> None:
    print("| rule | block | ms before | ms | × | largest difference | peak of the output |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    cases = [("attention", attention(*sizes)) for sizes in ATTENTIONS]
    cases += [("fast_conv", convolution(*sizes)) for sizes in CONVOLUTIONS]
    for number, (rule, (title, module, contract)) in enumerate(cases):
        before = export(module, contract, folder / f"block{number}")
        after = fuse(before, contract, folder / f"block{number}-fused", (rule,))
        feeds, opened = feeds_of(contract), {}
        for name, model in (("before", before), ("after", after)):
            opened[name] = OnnxSession().open(model, contract, "cpu", THREADS)
        calls = {name: lambda s=s, feeds=feeds: s.infer(feeds)["y"] for name, s in opened.items()}
        gap = np.abs(calls["before"]() - (found := calls["after"]())).max()
        if onnx.read_model(before.path).graph == onnx.read_model(after.path).graph:
            print(f"| {rule} | {title} | left alone | | | | |", flush=True)
            continue
        times = {name: statistics.median(t) for name, t in seconds(calls, rounds, clock).items()}
        print(f"| {rule} | {title} | {1e3 * times['before']:.1f} | {1e3 * times['after']:.1f} | "
              f"{times['after'] / times['before']:.2f} | {gap:.1e} | {np.abs(found).max():.1f} |",
              flush=True)  # fmt: skip


def networks(folder: Path, names: list[str], rounds: int, every: bool) -> None:
    source = open_pipeline(MODEL)
    half = {"unit": "native", "min": 0.5, "opt": 1, "max": 2}
    axes = native_axes(source, {"batch": SimpleNamespace(unit="pixels", min=1, opt=1, max=4),
                                "height": SimpleNamespace(**half),
                                "width": SimpleNamespace(**half)})  # fmt: skip
    print("\n| network | engine | s a call | × eager | largest difference from eager | peak | "
          "s to open | MB |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name in names:
        contract = contract_for(source, name, axes)
        module = load_component(source.components[name].folder, name)
        before = export(module, contract, folder / f"{name}-fp32")
        engines = {"onnxruntime": before}
        if every:
            for rule in RULES:
                engines[f"onnxruntime, {rule}"] = fuse(
                    before, contract, folder / f"{name}-{rule}", (rule,)
                )
        engines["onnxruntime, every rule"] = fuse(
            before, contract, folder / f"{name}-fused", tuple(RULES)
        )
        feeds, opened, spent = feeds_of(contract), {}, {}
        for title, model in engines.items():
            started = time.perf_counter()
            opened[title] = OnnxSession().open(model, contract, "cpu", THREADS)
            spent[title] = time.perf_counter() - started
        tensors = [torch.from_numpy(feeds[spec.name]) for spec in contract.inputs]

        def eager(module=module, tensors=tensors) -> np.ndarray:
            with torch.inference_mode():
                return module(*tensors).numpy()

        calls = {"PyTorch eager": eager}
        output = contract.outputs[0].name
        for title, session in opened.items():
            calls[title] = lambda s=session, f=feeds, o=output: s.infer(f)[o]
        exact = eager()
        gaps = {title: np.abs(call() - exact).max() for title, call in calls.items()}
        times = {t: statistics.median(found) for t, found in seconds(calls, rounds).items()}
        for title, found in times.items():
            size = f"{onnx.size_bytes(engines[title].path) / 1e6:.0f}" if title in engines else ""
            opening = f"{spent[title]:.2f}" if title in spent else ""
            print(f"| {name} | {title} | {found:.2f} | {found / times['PyTorch eager']:.3f} | "
                  f"{gaps[title]:.1e} | {np.abs(exact).max():.1f} | {opening} | {size} |",
                  flush=True)  # fmt: skip
        del opened, calls, module


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="blocks in CPU time, both threads' sum: "
                        "what a busy machine disturbs least")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keeps the models that are made")
    parser.add_argument("--networks", nargs="+", default=["unet", "vae_decoder", "text_encoder"])
    parser.add_argument("--each-rule", action="store_true", help="each rule alone on networks too")
    parser.add_argument("--no-networks", action="store_true")
    parser.add_argument("--no-blocks", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory(prefix="diffoundry-") as scratch:
        folder = options.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not options.no_blocks:
            blocks(folder, options.rounds, time.process_time if options.cpu else time.perf_counter)
        if not options.no_networks:
            networks(folder, options.networks, options.rounds, options.each_rule)


if __name__ == "__main__":
    main()
