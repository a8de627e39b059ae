"""Measures what float16 costs: each operation computes in float32, and what it reads and writes
is rounded to float16 where a trial says so.

One float32 graph holds every rounding behind a switch, so that a trial is one run. Weights stay in
the file that the model came with, mapped once: what a run needs beside them is its own values.

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

_FILE, _PEAKS_FILE = "trials.onnx", "peaks.onnx"
_SWITCHES, _PEAKS = "fp16_trial/switches", "fp16_trial/peaks"
_PEAK_NODES = ("Abs", "ReduceMax", "Reshape")


@dataclass(frozen=True)
class Edge:
    """A float value on its way from one node to another (None: a graph input, output, weight)."""

    value: str
    producer: str | None
    reader: str | None


class Trials:
    """A session over the switched graph. `candidates` are the nodes that can be float16.

    `model` is rewritten and given up: nothing here keeps it. `calls` are the feeds to measure on;
    `folder` is where it was read from, and takes temporary files.
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
        self._peaks = _measure_peaks(model, calls, folder, threads)
        self.edges = _add_switches(model, set(self.candidates))
        _save(model, folder / _FILE)
        del model
        self._session = _open(folder / _FILE, threads)
        self.runs = 0
        self._references = [self._run(call, set()) for call in calls]

    def peaks(self) -> dict[str, float]:
        """Largest absolute float32 value of every value over the calls, in execution order."""
        return self._peaks

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
        return list(self._session.run(self._outputs, {**call, _SWITCHES: switches}))


def _measure_peaks(
    model: ir.Model, calls: Sequence[Mapping[str, Any]], folder: Path, threads: int
) -> dict[str, float]:
    """Largest absolute value of every float value over the calls; `model` stays as it was.

    A graph of its own: in one with the switches every value would wait for its peak to be asked
    for, and 107 M parameters held 11 GB.
    """
    import numpy as np

    values, builder = _float_values(model.graph), _Builder(model.graph)
    model.graph.outputs.append(builder.peaks(values))
    builder.place()
    _save(model, folder / _PEAKS_FILE)
    model.graph.outputs.pop()
    builder.take_out()
    session, worst = _open(folder / _PEAKS_FILE, threads), np.zeros(len(values))
    for call in calls:
        (found,) = session.run([_PEAKS], dict(call))
        worst = np.fmax(worst, np.where(np.isnan(found), np.inf, found))
    names = [value.name or "" for value in values]
    return {name: float(peak) for name, peak in zip(names, worst, strict=True)}


def _float_values(graph: ir.Graph) -> list[ir.Value]:
    """Inputs and what nodes compute, in execution order."""
    import onnx_ir as ir

    values = (*graph.inputs, *(value for node in graph for value in node.outputs))
    return [value for value in values if value.dtype == ir.DataType.FLOAT]


def _save(model: ir.Model, file: Path) -> None:
    """Write the graph, its large weights where they are, and let go of their mapping.

    A mapping counts in the process's memory, and the session makes its own.
    """
    import onnx_ir as ir

    ir.save(model, file)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


def _open(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # An arena keeps what its fullest moment took, twice over where sizes do not fit.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Optimizers would remove the pairs of casts.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # the order of the file
    # Kernels would keep the weights once more, in an order of their own.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _weight_peaks(model: ir.Model) -> dict[str, float]:
    """Largest absolute value of every float weight, by its name."""
    import numpy as np
    import onnx_ir as ir

    peaks = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT:
            array = value.const_value.numpy()
            # Two passes and no copy, as np.abs would make.
            peaks[name] = max(float(np.max(array, initial=0.0)), -float(np.min(array, initial=0.0)))
    return peaks


def _add_switches(model: ir.Model, candidates: set[str]) -> list[Edge]:
    """Rewrite the graph; return its edges in switch order."""
    import onnx_ir as ir

    graph, builder = model.graph, _Builder(model.graph)
    nodes = list(graph)
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
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
    graph.inputs.append(switches)
    builder.place()
    return edges


class _Builder:
    """Makes nodes with names of their own, and puts the graph in order at the end."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._constants: list[str] = []

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
        self._constants.append(name)
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
        self._constants.append("fp16_trial/one")
        output = self.add("Concat", *(self.add("Reshape", v, shape) for v in flat), axis=0)
        output.name = _PEAKS
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(values)])
        return output

    def place(self) -> None:
        """Put what was added into the graph, each node as near to the value that it reads, or to
        the node that reads it, as can be: all that lies between them has to be held."""
        originals = list(self._graph)
        order = _Order(set(self._nodes))
        for node in originals:
            order.put(node)
            for value in node.outputs:
                order.follow(value)
        for node in self._nodes:
            order.put(node)
        self._graph.remove(originals)
        self._graph.extend(order.nodes)

    def take_out(self) -> None:
        """Undo `place`: nothing else may read what was added."""
        self._graph.remove(reversed(self._nodes), safe=True)
        for name in self._constants:
            del self._graph.initializers[name]


class _Order:
    """Nodes in execution order: `own` ones just before what reads them."""

    def __init__(self, own: set[Any]) -> None:
        self._own, self._placed = own, set[Any]()
        self.nodes: list[Any] = []

    def put(self, node: Any) -> None:
        """Append a node that is not there yet, and before it the own ones that it reads."""
        if node in self._placed:
            return
        self._placed.add(node)
        for value in node.inputs:
            source = value.producer() if value is not None else None
            if source in self._own:
                self.put(source)
        self.nodes.append(node)

    def follow(self, value: Any) -> None:
        """Append what takes a value's peak (Abs, ReduceMax, Reshape), so that it can go."""
        for reader in value.consumers():
            if reader in self._own and reader.op_type in _PEAK_NODES:
                self.put(reader)
                self.follow(reader.outputs[0])
