"""Opens what optimum-onnx and optimum-intel made, in their environments (see `answering`).

The description: {"kind": "ort" or "openvino", "folder": the exported pipeline, "what": [...],
"threads": 2, "side": 512, "steps": 4, "config": {}}. One call of a component goes to the runtime
itself, as its pipeline opens it; a picture is the pipeline's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from answering import Call, Opened, answer_calls, timed

PROMPT = "a small red circle on a blue background"
DRAWN = {"timestep": (1,), "encoder_hidden_states": (1, 77, 768), "timestep_cond": (1, 256)}


def feeds(inputs: list[tuple[str, Any, int]], side: int) -> dict[str, Any]:
    """Drawn inputs by (name, dtype, rank): latents are side/8 pixels wide."""
    draw, found = np.random.default_rng(0), {}
    for name, dtype, rank in inputs:
        if name == "timestep":
            found[name] = np.full((1,) * rank, 499).astype(dtype)
        else:
            size = DRAWN.get(name, (1, 4, side // 8, side // 8))
            found[name] = draw.standard_normal(size, np.float32).astype(dtype)
    return found


def ort_component(folder: Path, order: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """One network in onnxruntime, with the options that a pipeline of optimum-onnx gives it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = order["threads"]
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    found = feeds([(i.name, kinds[i.type], len(i.shape)) for i in session.get_inputs()],
                  order["side"])  # fmt: skip
    return lambda number: session.run(None, found), {}


def ov_component(folder: Path, order: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """One network in OpenVINO, with the hint that a pipeline of optimum-intel gives it."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": order["threads"],
              **order.get("config", {})}  # fmt: skip
    core = openvino.Core()
    compiled = core.compile_model(str(folder / "openvino_model.xml"), "CPU", config)
    request = compiled.create_infer_request()
    ports = [
        (port.get_any_name(), port.get_element_type().to_dtype(), len(port.get_partial_shape()))
        for port in compiled.inputs
    ]
    found = feeds(ports, order["side"])
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    return lambda number: request.infer(found, share_inputs=True), {"precision": precision}


def pipeline_of(order: dict[str, Any]) -> Any:
    """The tool's own pipeline over the exported folder, its networks opened."""
    import torch

    torch.set_num_threads(order["threads"])
    if order["kind"] == "ort":
        import onnxruntime
        from optimum.onnxruntime import ORTDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = order["threads"]
        return ORTDiffusionPipeline.from_pretrained(order["folder"], session_options=options)
    from optimum.intel import OVDiffusionPipeline

    config = {"INFERENCE_NUM_THREADS": order["threads"], **order.get("config", {})}
    pipeline = OVDiffusionPipeline.from_pretrained(order["folder"], ov_config=config, compile=False)
    pipeline.compile()
    return pipeline


def picture_call(order: dict[str, Any]) -> Call:
    """A whole picture, text to pixels."""
    import torch

    pipeline = pipeline_of(order)
    pipeline.set_progress_bar_config(disable=True)

    def call(number: int) -> object:
        return pipeline(
            PROMPT, num_inference_steps=order["steps"], guidance_scale=8.5,
            height=order["side"], width=order["side"],
            generator=torch.Generator().manual_seed(number),
        )  # fmt: skip

    return call


def open_contender(order: dict[str, Any]) -> Opened:
    """Open what the description asks for."""
    component = ort_component if order["kind"] == "ort" else ov_component
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    notes: dict[str, Any] = {}
    for what in order["what"]:
        if what == "picture":
            calls[what], seconds[what] = timed(lambda: picture_call(order))
        else:
            folder = Path(order["folder"]) / what
            (calls[what], more), seconds[what] = timed(
                lambda folder=folder: component(folder, order)
            )
            notes.update(more)
    return Opened(calls, seconds, notes)


if __name__ == "__main__":
    answer_calls(open_contender)
