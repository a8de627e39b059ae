"""Lets NNCF choose the ranges of layers' inputs on an exported graph, and reads them back.

`nncf.quantize` also puts quantizers on graph inputs, adds and means; a plan names layers only, so
those are left behind here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffoundry.compression.ranges import Seen
from diffoundry.compression.statistics import feeds_of
from diffoundry.errors import MissingToolError, StageError
from diffoundry.formats.quant_plan import Range
from diffoundry.types import Array

if TYPE_CHECKING:
    import torch

    from diffoundry.formats.recording import Call
    from diffoundry.types import Contract

# What only moves values between a quantizer and the layer that takes them.
_MOVES = ("dropout", "view", "reshape", "transpose", "permute", "contiguous", "unsqueeze",
          "squeeze", "flatten", "expand", "slice", "chunk", "getitem", "clone")  # fmt: skip


@dataclass(frozen=True)
class NncfOptions:
    """How NNCF looks: at `calls` calls, evenly spread. `range_method` "own" is NNCF's (means of the
    calls' extremes); "percentile" leaves out (100 − percentile) % at each end of every call."""

    calls: int = 300
    transformer: bool = True
    symmetric: bool = False
    range_method: str = "own"
    percentile: float = 99.99
    bias_correction: bool = False


@dataclass(frozen=True)
class Found:
    """What NNCF chose for one layer: its input's range (None: it left the input alone), and the
    corrected bias float32 [out] where it corrected one."""

    activation: Range | None
    bias: Array | None = None


def import_nncf() -> Any:
    """The package `nncf`, without the usage statistics that importing it would send.

    It reports through the package `openvino_telemetry`, as OpenVINO does, and takes a stub of its
    own where that is absent. Raises MissingToolError without nncf.
    """
    if "nncf" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        with _quiet():
            return importlib.import_module("nncf")
    except ImportError as error:
        raise MissingToolError(
            "quantize_nncf",
            expected="nncf",
            found=f"no {error.name}",
            remedy="pip install 'diffoundry[build,quantize]'",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF prints progress bars and warns about its own experimental back end."""
    logger = logging.getLogger("nncf")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


def ask_nncf(
    program: torch.export.ExportedProgram,
    contract: Contract,
    calls: Sequence[Call],
    wanted: Sequence[str],
    options: NncfOptions,
) -> dict[str, Found]:
    """What NNCF chooses for the layers named in `wanted` on `calls`.

    Raises StageError that names every layer which the graph does not have.
    """
    import torch

    from diffoundry.formats.recording import spread

    nncf = import_nncf()
    where = f"quantize_nncf: {contract.component}"
    taken = spread(calls, options.calls)
    with _quiet(), torch.no_grad():
        dataset = nncf.Dataset(taken, lambda call: tuple(feeds_of(contract, call.feeds)))
        graph = nncf.quantize(
            program.module(),
            dataset,
            preset=(
                nncf.QuantizationPreset.PERFORMANCE
                if options.symmetric
                else nncf.QuantizationPreset.MIXED
            ),
            model_type=nncf.ModelType.TRANSFORMER if options.transformer else None,
            subset_size=len(taken),
            fast_bias_correction=True,
            advanced_parameters=_advanced(nncf, options),
        )
    before = _biases(program, set(wanted)) if options.bias_correction else {}
    found = _read(graph, set(wanted), before)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise StageError(
            where,
            expected="an exported graph with every layer of the module",
            found=f"no node of {', '.join(missing)}",
            remedy="trace and quantize the same module",
        )
    return found


def extremes(
    module: torch.nn.Module, contract: Contract, calls: Sequence[Call], wanted: Sequence[str]
) -> dict[str, Seen]:
    """Smallest and largest input of each layer: NNCF plans around infinities without a word."""
    import torch

    found = {name: Seen(-1) for name in wanted}

    def watch(seen: Seen) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = (float(value) for value in torch.aminmax(inputs[0]))
            # NaN compares with nothing, and must not get lost.
            seen.low = low if not low >= seen.low else seen.low
            seen.high = high if not high <= seen.high else seen.high

        return hook

    layers = dict(module.named_modules())
    hooks = [layers[name].register_forward_pre_hook(watch(seen)) for name, seen in found.items()]
    try:
        with torch.no_grad():
            for call in calls:
                module(*feeds_of(contract, call.feeds))
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _advanced(nncf: Any, options: NncfOptions) -> Any:
    module = importlib.import_module("nncf.quantization.range_estimator")
    sets = module.RangeEstimatorParametersSet
    ranges: Any = {
        "minmax": sets.MINMAX,
        "percentile": module.RangeEstimatorParameters(
            min=module.StatisticsCollectorParameters(
                statistics_type=module.StatisticsType.QUANTILE,
                aggregator_type=module.AggregatorType.MEAN,
                quantile_outlier_prob=1 - options.percentile / 100,
            ),
            max=module.StatisticsCollectorParameters(
                statistics_type=module.StatisticsType.QUANTILE,
                aggregator_type=module.AggregatorType.MEAN,
                quantile_outlier_prob=1 - options.percentile / 100,
            ),
        ),
    }.get(options.range_method)
    # SmoothQuant inside NNCF would change inputs that the plan knows by their layer alone;
    # `smooth_linear` does the same to the module itself.
    more = {} if ranges is None else {"activations_range_estimator_params": ranges}
    return nncf.AdvancedQuantizationParameters(
        disable_bias_correction=not options.bias_correction,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        **more,
    )


def _layers(graph: Any) -> Iterator[tuple[str, Any]]:
    """Qualified module name and node of every convolution and linear layer."""
    import torch

    from diffoundry.compression.fx_observing import module_of

    operations = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    for node in graph.nodes:
        if node.target in operations:
            yield module_of(node), node


def _biases(program: Any, wanted: set[str]) -> dict[str, Array]:
    state = program.state_dict
    return {name: state[f"{name}.bias"].detach().numpy() for name in wanted
            if f"{name}.bias" in state}  # fmt: skip


def _read(graph: Any, wanted: set[str], before: Mapping[str, Array]) -> dict[str, Found]:
    import numpy as np

    found = {}
    for name, node in _layers(graph.graph):
        if name in wanted:
            bias = None
            if name in before:
                value = _constant(graph, node.args[2])
                if not np.array_equal(value, before[name]):
                    bias = value.astype(np.float32)
            found[name] = Found(_range_before(node.args[0]), bias)
    return found


def _constant(graph: Any, node: Any) -> Array:
    value = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach().numpy()


def _range_before(node: Any) -> Range | None:
    """The range of the quantizer that `node`'s value comes from without being computed on."""
    while node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        if name.startswith("dequantize_per_tensor"):
            return _range_of(*node.args[1:5])
        if not name.startswith(_MOVES):
            return None
        node = node.args[0]
    return None


def _range_of(scale: float, zero_point: int, low: int, high: int) -> Range:
    if zero_point == 0 and low < 0:
        low = -high  # the middle of a symmetric grid, whose lowest value a plan leaves free
    return Range((low - zero_point) * float(scale), (high - zero_point) * float(scale))
