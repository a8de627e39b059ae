"""Measures what float16 costs: each operation computes in float32, and what it reads and writes
is rounded to float16 where a trial says so.

One float32 graph holds every rounding behind a switch, so that a trial is one run:

    value ─┬─ Cast16 ── Cast32 ── rounded ─┐
           └───────────────────────────────┴─ Where(switch[edge]) ── reader
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.exporters import fp16_graph

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

_SWITCHES, _PEAKS = "fp16_trial/switches", "fp16_trial/peaks"
# protobuf's limit, with room for the graph.
_EXTERNAL_BYTES = 1_900_000_000


@dataclass(frozen=True)
class Edge:
    """A float value on its way from one node to another (None: a graph input, output, weight)."""

    value: str
    producer: str | None
    reader: str | None


class Trials:
    """A session over the switched graph. `candidates` are the nodes that can be float16.

    `model` is rewritten; `calls` are the feeds to measure on; `folder` takes temporary files.
    """

    def __init__(
        self,
        model: ir.Model,
        calls: Sequence[Mapping[str, Any]],
        folder: Path,
        threads: int,
    ) -> None:
        fp16_graph.check_convertible(model)
        self.candidates = {
            node.name or "": node.op_type for node in model.graph if fp16_graph.can_be_fp16(node)
        }
        self._calls = calls
        self._outputs = [value.name or "" for value in model.graph.outputs]
        self.weight_peaks = _weight_peaks(model)
        self.edges, self._values = _add_switches(model, set(self.candidates))
        self._session = _open(model, folder, threads)
        self.runs = 0
        self._references = [self._run(call, set()) for call in calls]

    def peaks(self) -> dict[str, float]:
        """Largest absolute float32 value of every value over the calls, in execution order."""
        import numpy as np

        worst = np.zeros(len(self._values))
        for call in self._calls:
            feeds = {**call, _SWITCHES: np.zeros(len(self.edges), bool)}
            (found,) = self._session.run([_PEAKS], feeds, _path_only())
            worst = np.fmax(worst, np.where(np.isnan(found), np.inf, found))
        return {name: float(peak) for name, peak in zip(self._values, worst, strict=True)}

    def noise(self, half: set[str]) -> np.ndarray[Any, Any]:
        """Noise-to-signal power of every output on every call when `half` are float16 nodes.

        Returns [calls, outputs], infinite where a value is not finite.
        """
        import numpy as np

        rows = []
        for call, reference in zip(self._calls, self._references, strict=True):
            row = []
            for exact, found in zip(reference, self._run(call, half), strict=True):
                power = float(np.sum(np.square(exact, dtype=np.float64)))
                noise = float(np.sum(np.square(np.subtract(found, exact, dtype=np.float64))))
                row.append(noise / max(power, 1e-30) if np.isfinite(noise) else np.inf)
            rows.append(row)
        return np.array(rows)

    def _run(self, call: Mapping[str, Any], half: set[str]) -> list[Any]:
        import numpy as np

        switches = np.array([e.producer in half or e.reader in half for e in self.edges], bool)
        self.runs += 1
        found = self._session.run(self._outputs, {**call, _SWITCHES: switches}, _path_only())
        return list(found)


def _path_only() -> Any:
    """Run options that leave out what the wanted outputs do not need."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def _open(model: ir.Model, folder: Path, threads: int) -> Any:
    import onnx_ir as ir
    import onnxruntime

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    external = {"external_data": "trials.onnx.data"} if size > _EXTERNAL_BYTES else {}
    ir.save(model, folder / "trials.onnx", **external)
    options = onnxruntime.SessionOptions()
    # Optimizers would remove the pairs of casts.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(folder / "trials.onnx"), options, providers=["CPUExecutionProvider"]
    )


def _weight_peaks(model: ir.Model) -> dict[str, float]:
    """Largest absolute value of every float weight, by its name."""
    import numpy as np
    import onnx_ir as ir

    return {
        name: float(np.max(np.abs(value.const_value.numpy()), initial=0.0))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT
    }


def _add_switches(model: ir.Model, candidates: set[str]) -> tuple[list[Edge], list[str]]:
    """Rewrite the graph; return its edges in switch order, and the values of `peaks`."""
    import onnx_ir as ir

    graph, builder = model.graph, _Builder(model.graph)
    nodes = list(graph)
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    values = [value for value in (*graph.inputs, *(v for n in nodes for v in n.outputs))
              if value.dtype == ir.DataType.FLOAT]  # fmt: skip
    names = [value.name or "" for value in values]
    for node in filter(fp16_graph.touches_float, nodes):
        for position, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                readers.setdefault(value, []).append((node, position))
    switches = ir.Value(name=_SWITCHES, type=ir.TensorType(ir.DataType.BOOL),
                        shape=ir.Shape(["edges"]))  # fmt: skip
    edges: list[Edge] = []

    def switched(value: ir.Value, rounded: ir.Value, reader: str | None) -> ir.Value:
        producer = value.producer()
        index = builder.constant(len(edges))
        edges.append(Edge(value.name or "", producer.name if producer else None, reader))
        switch = builder.add("Gather", switches, index)
        return builder.add("Where", switch, rounded, value)

    for value, found in readers.items():
        half = {node.name for node, position in found if (position, value) in
                fp16_graph.float_inputs(node)} & candidates  # fmt: skip
        producer = value.producer()
        if not half and (producer is None or producer.name not in candidates):
            continue
        rounded = builder.rounded(value)
        made: dict[str, ir.Value] = {}
        for node, position in found:
            name = node.name or ""
            if name not in made:
                made[name] = switched(value, rounded, name if name in half else None)
            node.replace_input_with(position, made[name])
    for position, value in enumerate(list(graph.outputs)):
        name = value.name
        value.name = f"{name}.exact"
        graph.outputs[position] = switched(value, builder.rounded(value), None)
        graph.outputs[position].name = name
    graph.outputs.append(builder.peaks(values))
    graph.inputs.append(switches)
    builder.place()
    return edges, names


class _Builder:
    """Makes nodes with names of their own, and puts the graph in order at the end."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        name = f"fp16_trial/{len(self._nodes)}"
        node = ir.node(op_type, inputs, attributes, name=name,
                       outputs=[ir.Value(name=name)])  # fmt: skip
        self._nodes.append(node)
        return node.outputs[0]

    def constant(self, number: int) -> ir.Value:
        import numpy as np
        import onnx_ir as ir

        name = f"fp16_trial/index_{number}"
        value = ir.Value(name=name, const_value=ir.tensor(np.int64(number), name=name),
                         type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))  # fmt: skip
        self._graph.initializers[name] = value
        return value

    def rounded(self, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        half = self.add("Cast", value, to=int(ir.DataType.FLOAT16))
        return self.add("Cast", half, to=int(ir.DataType.FLOAT))

    def peaks(self, values: Sequence[ir.Value]) -> ir.Value:
        flat = [self.add("ReduceMax", self.add("Abs", value), keepdims=0) for value in values]
        import numpy as np
        import onnx_ir as ir

        shape = ir.Value(name="fp16_trial/one",
                         const_value=ir.tensor(np.array([1], np.int64), name="fp16_trial/one"),
                         type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))  # fmt: skip
        self._graph.initializers["fp16_trial/one"] = shape
        output = self.add("Concat", *(self.add("Reshape", v, shape) for v in flat), axis=0)
        output.name = _PEAKS
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(values)])
        return output

    def place(self) -> None:
        self._graph.extend(self._nodes)
        self._graph.sort()
