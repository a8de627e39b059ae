"""One layer at a time: what it does to the component's outputs when it alone is quantized, or,
where that is too dear, to its own output, all layers in one pass."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffoundry.compression.costs import count_multiply_adds
from diffoundry.compression.simulator import quantized, simulated
from diffoundry.compression.statistics import feeds_of
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan
from diffoundry.formats.recording import spread
from diffoundry.formats.sensitivity import Row
from diffoundry.quality.differences import image_ssim, pooled_sqnr_db
from diffoundry.types import Array, Contract

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call

Cost = Literal["multiply_adds", "seconds"]
Say = Callable[[str], None]
_TIMED_CALLS = 3


class Bench:
    """A component, some recorded calls, and what it computes there when a plan is simulated."""

    def __init__(self, module: torch.nn.Module, contract: Contract, calls: Sequence[Call]) -> None:
        self.module = module
        self.contract = contract
        self.calls = calls
        self.feeds = [feeds_of(contract, call.feeds) for call in calls]
        self.output = contract.outputs[0].name
        self.wanted = [call.outputs[self.output] for call in calls]
        self.measurements = 0

    def keep_calls(self, count: int) -> None:
        """Go on with at most `count` of the calls, evenly spread."""
        self.calls = spread(self.calls, count)
        self.feeds, self.wanted = spread(self.feeds, count), spread(self.wanted, count)

    def run(self, plan: QuantPlan) -> list[Array]:
        """The first output of every call under `plan`."""
        import torch

        found = []
        self.measurements += 1
        with simulated(self.module, plan), torch.no_grad():
            for feeds in self.feeds:
                made = self.module(*feeds)
                found.append((made[0] if isinstance(made, tuple) else made).numpy())
        return found

    def sqnr_db(self, plan: QuantPlan) -> float:
        """SQNR of the first output over all calls."""
        return pooled_sqnr_db(self.wanted, self.run(plan))

    def row(self, plan: QuantPlan, layer: LayerPlan, cost: float) -> Row:
        """What `layer` alone does."""
        found = self.run(dataclasses.replace(plan, layers=(layer,)))
        return Row(
            layer.module,
            layer.scheme,
            sqnr_db=round(pooled_sqnr_db(self.wanted, found), 3),
            ssim=round(min(map(similarity, self.wanted, found)), 6),
            cost=cost,
        )

    def costs(self, kind: Cost) -> Mapping[str, float]:
        """Per layer: multiply-adds of one call, or the median of its measured seconds in float."""
        if kind == "multiply_adds":
            found = count_multiply_adds(self.module, self.feeds[0])
            return {name: float(value) for name, value in found.items()}
        return _seconds(self.module, self.feeds[:_TIMED_CALLS])


def measure_layers(
    bench: Bench, plan: QuantPlan, cost: Cost, journal: Path | None, say: Say
) -> tuple[Row, ...]:
    """A row for every layer that is not left in float, in the plan's order.

    Rows go into `journal` as they are made; those that stand there already are not made again.
    """
    done = _read(journal)
    costs = bench.costs(cost)
    layers = [layer for layer in plan.layers if layer.integer_weight]
    if done:
        say(f"{plan.component}: {len(done)} of {len(layers)} layers were measured before")
    rows = []
    for number, layer in enumerate(layers, 1):
        row = done.get(layer.module)
        if row is None:
            row = bench.row(plan, layer, costs.get(layer.module, 0.0))
            _append(journal, row)
        rows.append(row)
        if number % 20 == 0:
            say(f"{plan.component}: sensitivity of layer {number}/{len(layers)}")
    return tuple(rows)


def rank_layers(
    bench: Bench, plan: QuantPlan, costs: Mapping[str, float], calls: int
) -> tuple[Row, ...]:
    """A row for every layer that is not left in float, from one pass over `calls` calls.

    Each layer computes twice, exactly and as planned, on the exact input: `sqnr_db` is that of
    its own output. It ranks layers; what the component's output loses it does not say.
    """
    import torch

    modules = dict(bench.module.named_modules())
    layers = [layer for layer in plan.layers if layer.integer_weight]
    power = {layer.module: [0.0, 0.0] for layer in layers}
    hooks = []

    def watch(entry: LayerPlan) -> Any:
        busy = False

        def hook(layer: Any, inputs: Any, output: torch.Tensor) -> None:
            nonlocal busy
            if busy:  # its own second computation
                return
            busy = True
            alone = dataclasses.replace(plan, layers=(entry,))
            with quantized(layer, entry, alone):
                noise = (layer(*inputs) - output).double().square().sum()
            power[entry.module][0] += float(output.double().square().sum())
            power[entry.module][1] += float(noise)
            busy = False

        return hook

    for entry in layers:
        hooks.append(modules[entry.module].register_forward_hook(watch(entry)))
    try:
        with torch.no_grad():
            for feeds in spread(bench.feeds, calls):
                bench.module(*feeds)
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(
        Row(layer.module, layer.scheme, round(_ratio_db(*power[layer.module]), 3), 1.0,
            costs.get(layer.module, 0.0))
        for layer in layers
    )  # fmt: skip


def _ratio_db(signal: float, noise: float) -> float:
    """10 log10 of a ratio, within what a table can hold."""
    if noise <= 0.0:
        return 300.0
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -300.0, 300.0))


def similarity(wanted: Array, found: Array) -> float:
    """SSIM of two outputs taken as pictures of one channel each; 1 where they are none."""
    if wanted.ndim != 4 or min(wanted.shape[-2:]) < 3:
        return 1.0
    scores = []
    for one, other in zip(
        wanted.reshape(-1, *wanted.shape[-2:]), found.reshape(-1, *found.shape[-2:]), strict=True
    ):
        low, high = float(one.min()), float(one.max())
        span = (high - low) or 1.0
        pictures = [((x - low) / span)[..., None] for x in (one, other)]
        scores.append(image_ssim(*pictures))
    return float(np.mean(scores))


def _seconds(module: torch.nn.Module, feeds: Sequence[Sequence[Any]]) -> dict[str, float]:
    import torch

    started: dict[str, float] = {}
    taken: dict[str, list[float]] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):

            def before(_: Any, __: Any, name: str = name) -> None:
                started[name] = time.perf_counter()

            def after(_: Any, __: Any, ___: Any, name: str = name) -> None:
                taken.setdefault(name, []).append(time.perf_counter() - started[name])

            hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        with torch.no_grad():
            for one in feeds:
                module(*one)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float(np.median(values)) for name, values in taken.items()}


def _read(journal: Path | None) -> dict[str, Row]:
    """Rows of an interrupted run; a last line that was cut off is not one."""
    if journal is None or not journal.exists():
        return {}
    rows = {}
    for line in journal.read_text().splitlines():
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            continue
        rows[row.module] = row
    return rows


def _append(journal: Path | None, row: Row) -> None:
    if journal is not None:
        # After a line that was cut off, this one starts anew.
        before = journal.read_bytes() if journal.exists() else b""
        cut = before != b"" and not before.endswith(b"\n")
        with journal.open("a") as stream:
            stream.write(("\n" if cut else "") + json.dumps(dataclasses.asdict(row)) + "\n")
