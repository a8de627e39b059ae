"""Which form of an INT8 layer onnxruntime computes fastest, layer by layer and on whole networks.

    .venv/bin/python benchmarks/int8_kernels.py [--threads 1] [--rounds 15] [--no-networks]

Layers have the shapes of Stable Diffusion 1.5's U-Net at 512×512; the networks are the embedded
model's. All forms of a layer or network run in turn in one process: medians of their calls. Writes
Markdown to standard output (the tables of docs/compression/int8-kernels.md).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx as library
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compilers.quantize_fx import QuantizeFx
from diffoundry.compression.simulator import simulated
from diffoundry.embedded import DEFAULT_GUIDANCE, SHAPES_LCM
from diffoundry.embedded.prompts import load_split
from diffoundry.exporters.onnx_from_exported_program import write_fp32
from diffoundry.exporters.openvino_from_onnx import OpenvinoFromOnnx
from diffoundry.exporters.quantize_onnx import QuantizeOnnx, apply_plan
from diffoundry.formats import exported_program, onnx, openvino, quant_plan, recording
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import COMPONENTS, open_pipeline
from diffoundry.runtimes.onnx_session import OnnxSession
from diffoundry.runtimes.openvino_session import OpenvinoSession
from diffoundry.stages.capture import Capture
from diffoundry.types import Artifact, ArtifactType, StageContext

LINEAR = ((4096, 320, 320), (4096, 320, 2560), (1024, 640, 640), (256, 1280, 1280))
CONV = ((64, 320), (32, 640), (16, 1280))
KEEP = ("*conv_in", "*conv_out", "*time_embedding.*", "*time_emb_proj", "*post_quant_conv")
NETWORKS = ("text_encoder", "unet", "vae_decoder")


def one_layer(kind: str, x: np.ndarray, weight: np.ndarray) -> bytes:
    """A model of one fp32 layer, called "layer"."""
    bias = np.zeros(weight.shape[0], np.float32)
    if kind == "conv":
        pad = weight.shape[2] // 2
        tensors = {"layer.weight": weight, "layer.bias": bias}
        nodes = [helper.make_node("Conv", ["x", *tensors], ["y"], "/layer/Conv", pads=[pad] * 4)]
        shape = [*x.shape[:1], weight.shape[0], *x.shape[2:]]
    else:
        tensors = {"/layer/w": np.ascontiguousarray(weight.T), "layer.bias": bias}
        nodes = [helper.make_node("MatMul", ["x", "/layer/w"], ["p"], "/layer/MatMul"),
                 helper.make_node("Add", ["p", "layer.bias"], ["y"], "/layer/Add")]  # fmt: skip
        shape = [*x.shape[:-1], weight.shape[0]]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
             for name, dims in (("x", x.shape), ("y", shape))]  # fmt: skip
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "one", edges[:1], edges[1:], stored)
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def quantized(model: bytes, kind: str, weight: np.ndarray, form: str, **plan) -> bytes:
    """The layer as the package writes it."""
    span = Range(-4.0, 4.5)
    entry = LayerPlan("layer", kind, plan.get("scheme", "static"), activation=span,
                      output=span if plan.get("output") else None)  # fmt: skip
    scale = (np.abs(weight).reshape(weight.shape[0], -1).max(1) / 127).astype(np.float32)
    loaded = ir.from_proto(library.ModelProto.FromString(model))
    apply_plan(loaded, QuantPlan("unet", "", {}, (entry,), {"layer.weight_scale": scale}), form)
    return ir.to_proto(loaded).SerializeToString()


def signed(model: bytes) -> bytes:
    """The same with activations as int8."""
    proto = library.ModelProto.FromString(model)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.UINT8:
            array = (numpy_helper.to_array(tensor).astype(int) - 128).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto.SerializeToString()


def conv_integer(model: bytes) -> bytes:
    """The quantized convolution by ConvInteger: its product, without scales and bias."""
    proto = library.ModelProto.FromString(model)
    (conv,) = (node for node in proto.graph.node if node.op_type == "QLinearConv")
    (quantizer,) = (node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    made = [helper.make_node("ConvInteger", [conv.input[0], conv.input[3], conv.input[2]], ["i"]),
            helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)]  # fmt: skip
    made[0].attribute.extend(conv.attribute)
    del proto.graph.node[:]
    proto.graph.node.extend([quantizer, *made])
    return proto.SerializeToString()


def session(model: bytes, threads: int, fuses: bool = False) -> onnxruntime.InferenceSession:
    """`fuses`: onnxruntime makes of Q/DQ pairs what it can."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fuses else "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def milliseconds(calls: Mapping[str, object], rounds: int) -> dict[str, float]:
    """Median of each, called in turn: `rounds` times, or as often as fits into five seconds."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    started = time.perf_counter()
    for call in calls.values():
        call()
    rounds = max(rounds, min(300, int(5 / (time.perf_counter() - started))))
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def layer_row(kind: str, x: np.ndarray, weight: np.ndarray, threads: int, rounds: int) -> None:
    model = one_layer(kind, x, weight)

    def made(form: str, **plan) -> bytes:
        return quantized(model, kind, weight, form, **plan)

    sessions = {
        "float32": session(model, threads),
        "Q/DQ, fused by onnxruntime": session(made("qdq"), threads, True),
        "the same, output too": session(made("qdq", output=True), threads, True),
        "integer": session(made("integer"), threads),
        "integer, signed": session(signed(made("integer")), threads),
        "integer, dynamic": session(made("integer", scheme="dynamic"), threads),
    }
    if kind == "conv":
        on_grid = made("integer", output=True)
        sessions["integer, output on a grid"] = session(on_grid, threads)
        sessions["ConvInteger"] = session(conv_integer(on_grid), threads)
    found = milliseconds(
        {name: lambda s=s: s.run(None, {"x": x}) for name, s in sessions.items()}, rounds
    )
    size = "×".join(map(str, x.shape[1:]))
    columns = "".join(f" | {found[name]:.1f}" if name in found else " | " for name in (
        "float32", "Q/DQ, fused by onnxruntime", "the same, output too", "integer",
        "integer, output on a grid", "integer, dynamic", "integer, signed", "ConvInteger"
    ))  # fmt: skip
    print(f"| {kind} {size} → {weight.shape[0]}{columns} |", flush=True)


def layers(threads: int, rounds: int) -> None:
    random = np.random.default_rng(0)
    print("| ms | float32 | Q/DQ, fused by onnxruntime | the same, output too | **integer** | "
          "**integer, output on a grid** | integer, dynamic | integer, signed activations | "
          "ConvInteger |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for rows, taken, given in LINEAR:
        x = random.standard_normal((1, rows, taken)).astype(np.float32)
        weight = random.standard_normal((given, taken)).astype(np.float32)
        layer_row("linear", x, weight, threads, rounds)
    for side, channels in CONV:
        x = random.standard_normal((1, channels, side, side)).astype(np.float32)
        weight = random.standard_normal((channels, channels, 3, 3)).astype(np.float32)
        layer_row("conv", x, weight, threads, rounds)


def record(split: str, count: int, folder: Path):
    """The components' calls along the trajectories of `count` pairs, and their contracts."""
    source = open_pipeline(SHAPES_LCM)
    contracts = {n: contract_for(source, n, native_axes(source, {})) for n in COMPONENTS}
    inputs = {n: Artifact(ArtifactType("torch_module"), source.components[n].folder, "", n)
              for n in COMPONENTS}  # fmt: skip
    inputs["pipeline_files"] = Artifact(ArtifactType("pipeline_files"), source.path, "")
    pairs = tuple((pair.prompt, pair.seed) for pair in load_split(split)[:count])
    folder.mkdir()
    stage = Capture("calibration", pairs, guidance=DEFAULT_GUIDANCE, calls_per_component=count,
                    max_calls=4 * count)  # fmt: skip
    return source, contracts, stage.run(inputs, StageContext(work=folder, contracts=contracts))


def networks(threads: int, rounds: int, folder: Path) -> None:
    source, contracts, calibration = record("calibration", 32, folder / "calibration")
    *_, evaluation = record("evaluation", 8, folder / "evaluation")
    print("| network | engine | ms | × fp32 | SQNR, dB | simulator's | planned static layers in "
          "integer kernels | MB | × fp32 |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name in NETWORKS:
        contract = contracts[name]
        calls = recording.load_component(evaluation[name].path).calls[:4]
        _network(source.components[name].folder, contract, calibration[name].path, calls,
                 folder / name, threads, rounds)  # fmt: skip


def _network(source, contract, calibration, calls, folder, threads, rounds) -> None:
    module = load_component(source, contract.component)

    def step(name: str) -> StageContext:
        (folder / name).mkdir(parents=True)
        return StageContext(folder / name, contract.component, contract, threads=threads)

    def artifact(kind: str, precision: str | None, path: Path) -> Artifact:
        return Artifact(ArtifactType(kind, precision), path, "", contract.component)

    program = trace(module, contract)
    exported_program.save(program, step("program").work)
    write_fp32(program, contract, step("fp32").work, 18, onnx.EXTERNAL_THRESHOLD_BYTES)
    onnx.canonicalise(folder / "fp32")
    fp32 = artifact("onnx", "fp32", folder / "fp32")
    given = {
        "module": artifact("torch_module", None, source),
        "program": artifact("exported_program", "fp32", folder / "program"),
        "calibration": artifact("recording", None, calibration),
    }
    openvino_fp32 = OpenvinoFromOnnx().run({"model": fp32}, step("openvino"))["model"].path
    engines = {
        "onnxruntime fp32": (OnnxSession(), fp32, None),
        "OpenVINO fp32": (OpenvinoSession(), artifact("openvino", "fp32", openvino_fp32), None),
    }
    for title, options in (
        ("static", {}),
        ("static, outputs of convolutions", {"quantize_outputs": ("conv",)}),
        ("dynamic", {"conv": "dynamic", "linear": "dynamic"}),
        ("weight-only", {"conv": "weight_only", "linear": "weight_only"}),
    ):
        estimated = QuantizeFx(keep=KEEP, **options).run(given, step(f"{title} plan"))["plan"]
        plan = quant_plan.load(estimated.path)
        if "outputs" in title and not any(entry.output for entry in plan.layers):
            continue  # no convolutions: the same as static
        inputs = {"model": fp32, "plan": artifact("quant_plan", None, estimated.path)}
        for form in ("integer", "qdq"):
            made = QuantizeOnnx(form=form).run(inputs, step(f"{title} {form}"))["model"].path
            model = artifact("onnx", "int8", made)
            if form == "integer":
                engines[f"onnxruntime INT8, {title}"] = (OnnxSession(), model, plan)
                continue
            stage = OpenvinoFromOnnx(precision="int8")
            path = stage.run({"model": model}, step(f"{title} openvino"))["model"].path
            engine = (OpenvinoSession(), artifact("openvino", "int8", path), plan)
            engines[f"OpenVINO INT8, {title}"] = engine
    exact = np.stack([next(iter(call.outputs.values())) for call in calls])
    opened = {name: runtime.open(made, contract, "cpu", threads)
              for name, (runtime, made, _) in engines.items()}  # fmt: skip
    found = milliseconds(
        {name: lambda s=s: [s.infer(call.feeds) for call in calls] for name, s in opened.items()},
        rounds,
    )
    for name, (_, made, plan) in engines.items():
        base = next(n for n in found if n.split()[0] == name.split()[0])
        size = (onnx if made.type.kind == "onnx" else openvino).size_bytes(made.path)
        share = size / (onnx if made.type.kind == "onnx" else openvino).size_bytes(
            engines[base][1].path
        )
        outputs = np.stack([next(iter(opened[name].infer(c.feeds).values())) for c in calls])
        cells = ["", "", ""]
        if plan is not None:
            with torch.inference_mode(), simulated(module, plan):
                meant = np.stack([
                    module(*(torch.from_numpy(np.array(call.feeds[spec.name]))
                             for spec in contract.inputs)).numpy()
                    for call in calls
                ])  # fmt: skip
            static = {e.module for e in plan.layers if e.integer_kernel}
            ran = static & set(opened[name].precision_used()["integer_layers"])
            cells = [f"{_sqnr_db(exact, outputs):.1f}", f"{_sqnr_db(exact, meant):.1f}",
                     f"{len(ran)} of {len(static)}"]  # fmt: skip
        print(f"| {contract.component} | {name} | {found[name] / len(calls):.2f} | "
              f"{found[base] / found[name]:.2f} | {' | '.join(cells)} | {size / 1e6:.2f} | "
              f"{share:.2f} |", flush=True)  # fmt: skip


def _sqnr_db(exact: np.ndarray, found: np.ndarray) -> float:
    noise = float(((exact.astype(np.float64) - found) ** 2).sum())
    return 10 * math.log10(float((exact.astype(np.float64) ** 2).sum()) / noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-networks", action="store_true")
    parser.add_argument("--no-layers", action="store_true")
    options = parser.parse_args()
    if not options.no_layers:
        layers(options.threads, options.rounds)
    if not options.no_networks:
        print()
        networks(options.threads, options.rounds, Path(tempfile.mkdtemp()))


if __name__ == "__main__":
    main()
