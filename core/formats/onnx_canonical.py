"""Makes two exports of the same ONNX model byte-equal: names, order, metadata, external data.

torch's exporter leaves stack traces with absolute paths of the building machine in node metadata,
and numbers values in the order in which it happened to make them.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

PRODUCER = "diffoundry"
_SCOPES = "pkg.torch.onnx.name_scopes"
# Pages are 4 KiB: a runtime can map large weights straight from the file.
_LARGE_BYTES, _LARGE_ALIGNMENT, _ALIGNMENT = 1 << 20, 4096, 64


def canonicalise(model: ModelProto, folder: Path, data_file: str) -> None:
    """Canonicalise `model` in place, and re-lay its external data in `folder` as `data_file`."""
    name_nodes(model)
    _strip(model)
    _sort(model)
    _relay_external(model, folder, data_file)


def read_sizes_from_first(model: ModelProto) -> None:
    """Read each named size ("batch") from the first input that has it.

    Every input of that name has the same size; which one the exporter asks differs between a
    program in memory and the same program read from its file.
    """
    first: dict[str, tuple[str, int]] = {}
    dims: dict[str, list[str]] = {}
    for value in model.graph.input:
        dims[value.name] = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for position, name in enumerate(dims[value.name]):
            first.setdefault(name, (value.name, position))
    for node in model.graph.node:
        if node.op_type != "Shape" or node.input[0] not in dims:
            continue
        bounds = {attribute.name: attribute for attribute in node.attribute}
        start, rank = bounds["start"].i if "start" in bounds else 0, len(dims[node.input[0]])
        if 0 <= start < rank and "end" in bounds and bounds["end"].i == start + 1:
            name = dims[node.input[0]][start]
            if name:
                node.input[0], position = first[name]
                bounds["start"].i, bounds["end"].i = position, position + 1


def name_nodes(model: ModelProto) -> None:
    """Name nodes after the module they come from ("/down_blocks.0/resnets.0/conv1/Conv").

    A node's first output gets the node's name, anonymous weights get their first reader's name;
    graph inputs and outputs and named parameters keep theirs. Names that begin with "/" are
    kept, so the second time changes nothing.
    """
    graph = model.graph
    _place_sizes(graph)
    _name_each_node(graph)
    fixed = {value.name for value in [*graph.input, *graph.output]}
    renamed: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.output):
            if name and name not in fixed:
                renamed[name] = node.name if position == 0 else f"{node.name}.out{position}"
    anonymous = {t.name for t in graph.initializer if not any(c in t.name for c in "./")} - fixed
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in anonymous and name not in renamed:
                renamed[name] = f"{node.name}.in{position}"
    _rename(graph, renamed)


def _name_each_node(graph: GraphProto) -> None:
    paths = [_module_path(node) for node in graph.node]
    depth = _shared_depth([path for path in paths if path])
    taken = {node.name for node in graph.node if node.name.startswith("/")}
    made_in: dict[str, list[str]] = {}
    for node, path in zip(graph.node, paths, strict=True):
        where = (path or [])[depth:]
        if _reads_a_size(node):
            # Which module asks first for a size that several need is chance: say whose size it is.
            where = made_in.get(node.input[0], [])
        made_in.update(dict.fromkeys(node.output, where))
        if node.name.startswith("/"):
            continue
        base = "/" + "/".join([*where, node.op_type])
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name


def _place_sizes(graph: GraphProto) -> None:
    """Put every node that reads a size right behind what it reads: the exporter's order varies."""
    waiting: dict[str, list[NodeProto]] = {}
    others = []
    for node in graph.node:
        if _reads_a_size(node):
            waiting.setdefault(node.input[0], []).append(node)
        else:
            others.append(node)
    if not waiting:
        return
    ordered: list[NodeProto] = []

    def place(names: Iterable[str]) -> None:
        for name in names:
            for node in sorted(waiting.pop(name, []), key=_bounds):
                ordered.append(node)
                place(node.output)

    place([value.name for value in [*graph.input, *graph.initializer]])
    for node in others:
        ordered.append(node)
        place(node.output)
    _replace(graph.node, ordered)


def _bounds(node: NodeProto) -> list[tuple[str, int]]:
    return sorted((attribute.name, attribute.i) for attribute in node.attribute)


def _reads_a_size(node: NodeProto) -> bool:
    """Is it part of what the exporter makes of torch's sym_size (Shape, then Squeeze)?"""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    return node.op_type in ("Shape", "Squeeze") and "'sym_size" in text


def _module_path(node: NodeProto) -> list[str] | None:
    """Module names from the outermost inwards, from the exporter's scopes; None without them."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
    if text is None:
        return None
    scopes = [str(scope) for scope in ast.literal_eval(text)][:-1]
    parts, outer = [], ""
    for scope in scopes:
        # Scopes are cumulative ("a", "a.b.0"); what a pass of torch made has none of ours.
        if scope and not scope.startswith("_empty_nn_module_stack"):
            parts.append(scope.removeprefix(outer + ".") if outer else scope)
            outer = scope
    return parts


def _shared_depth(paths: list[list[str]]) -> int:
    """1 where every node lies in the same outermost module (a wrapper's only child), else 0."""
    return 1 if len({path[0] for path in paths}) == 1 else 0


def _rename(graph: GraphProto, renamed: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for subgraph in _subgraphs(attribute):
                _rename(subgraph, renamed)
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.name = renamed.get(value.name, value.name)


def _subgraphs(attribute: Any) -> Iterator[GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _strip(model: ModelProto) -> None:
    """Remove everything that says where, when and by whom the file was made."""
    model.producer_name, model.producer_version = PRODUCER, ""
    model.domain, model.model_version, model.doc_string = "", 0, ""
    del model.metadata_props[:]
    model.graph.name = "main"
    _strip_graph(model.graph)


def _strip_graph(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    # Types of inner values follow from the nodes; torch writes them with symbols of its own.
    del graph.value_info[:]
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
            for subgraph in _subgraphs(attribute):
                _strip_graph(subgraph)


def _sort(model: ModelProto) -> None:
    used = {node.domain for node in model.graph.node} | {""}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    _replace(model.opset_import, sorted(kept, key=lambda opset: opset.domain))
    _replace(model.graph.initializer, sorted(model.graph.initializer, key=lambda t: t.name))
    for node in model.graph.node:
        _replace(node.attribute, sorted(node.attribute, key=lambda a: a.name))


def _replace(field: Any, items: list[Any]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def _relay_external(model: ModelProto, folder: Path, data_file: str) -> None:
    """Write external weights again, in the order of their names, at aligned offsets.

    Weights that lie so already are left where they are.
    """
    from onnx import TensorProto

    tensors = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if not tensors:
        return
    offsets = _aligned_offsets(tensors)
    end = offsets[-1] + int(_entry(tensors[-1], "length"))
    file = folder / data_file
    laid_out = all(
        (_entry(tensor, "location"), _entry(tensor, "offset")) == (data_file, str(offset))
        for tensor, offset in zip(tensors, offsets, strict=True)
    )
    if not (laid_out and file.stat().st_size == end):
        _write_at(tensors, offsets, folder, data_file)
    for tensor, offset in zip(tensors, offsets, strict=True):
        length = _entry(tensor, "length")
        del tensor.external_data[:]
        for key, value in (("location", data_file), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))


def _aligned_offsets(tensors: Sequence[TensorProto]) -> list[int]:
    """Where each tensor's bytes begin in a file that holds them in this order."""
    offsets, position = [], 0
    for tensor in tensors:
        length = int(_entry(tensor, "length"))
        position += -position % (_LARGE_ALIGNMENT if length >= _LARGE_BYTES else _ALIGNMENT)
        offsets.append(position)
        position += length
    return offsets


def _write_at(
    tensors: Sequence[TensorProto], offsets: Sequence[int], folder: Path, data_file: str
) -> None:
    """Copy every tensor's bytes to its offset in a new data file, and remove the old files."""
    target = folder / f".{data_file}.new"
    sources = {_entry(tensor, "location") for tensor in tensors}
    with target.open("wb") as stream:
        for tensor, offset in zip(tensors, offsets, strict=True):
            stream.write(b"\0" * (offset - stream.tell()))
            with (folder / _entry(tensor, "location")).open("rb") as source:
                source.seek(int(_entry(tensor, "offset") or 0))
                left = int(_entry(tensor, "length"))
                while left:
                    block = source.read(min(left, 1 << 22))
                    stream.write(block)
                    left -= len(block)
    for name in sources:
        (folder / name).unlink()
    os.replace(target, folder / data_file)


def _entry(tensor: TensorProto, key: str) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == key), "")
