"""Which layers of a Core ML program are INT8, read from its operations alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

UNPLANNED = "unplanned"
_WEIGHT = re.compile(r"int8_of_(.*)_end")
_CONSTEXPR = ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale")
_MOVES = ("reshape", "transpose", "expand_dims", "squeeze", "cast", "pad", "add")
"""What may stand between a layer and its grid: an `add` is a bias."""


def weight_name(module: str) -> str:
    """What the INT8 weight of a layer is called: MIL's names have no dots."""
    return "int8_of_" + module.replace("_", "__").replace(".", "_d") + "_end"


def module_of(name: str) -> str | None:
    """The layer's qualified name, None for another name. What a converter appends is ignored."""
    found = _WEIGHT.search(name)
    if found is None:
        return None
    return re.sub("__|_d", lambda pair: "_" if pair[0] == "__" else ".", found[1])


def schemes_of(program: Any) -> dict[str, str]:
    """Qualified name -> "static" or "weight_only" of each layer of a MIL_pb2.Program.

    Whatever else is in INT8 comes under its value's name as "unplanned".
    """
    found: dict[str, str] = {}
    for function in program.functions.values():
        block = function.block_specializations[function.opset]
        for name, scheme in _Reading(list(block.operations)).schemes().items():
            found[name] = scheme if found.get(name, scheme) == scheme else UNPLANNED
    return dict(sorted(found.items()))


class _Reading:
    def __init__(self, operations: list[Any]) -> None:
        self._operations = operations
        self._makers = {one.name: op for op in operations for one in op.outputs}
        self._readers: dict[str, list[Any]] = {}
        for operation in operations:
            for name in _inputs(operation):
                self._readers.setdefault(name, []).append(operation)

    def schemes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        layers: list[Any] = []
        for operation in self._operations:
            if operation.type in _CONSTEXPR:
                name = operation.outputs[0].name
                readers = self._readers.get(name, [])
                kinds = {self._scheme(reader, name) for reader in readers}
                module = module_of(name)
                known = module is not None and len(kinds) == 1
                found[module or name] = kinds.pop() if known else UNPLANNED
                layers += readers
        for operation in self._operations:
            if operation.type == "quantize" and not self._serves(operation, layers):
                found[operation.outputs[0].name] = UNPLANNED
        return found

    def _scheme(self, layer: Any, weight: str) -> str:
        if layer.type == "gather":
            return "weight_only"
        values = [name for name in _inputs(layer, "x") if name != weight]
        return "static" if any(self._behind_grid(name) for name in values) else "weight_only"

    def _behind_grid(self, name: str) -> bool:
        maker = self._makers.get(name)
        while maker is not None and maker.type in _MOVES and maker.type != "add":
            maker = self._makers.get(next(_inputs(maker, "x"), ""))
        return maker is not None and maker.type == "dequantize"

    def _serves(self, quantize: Any, layers: list[Any]) -> bool:
        """Whether a layer reads what was quantized, or made it."""
        waiting = list(_inputs(quantize, "input"))
        while waiting:
            maker = self._makers.get(waiting.pop())
            if maker is not None and maker in layers:
                return True
            if maker is not None and maker.type in _MOVES:
                waiting += list(_inputs(maker))
        waiting = [one.name for one in quantize.outputs]
        while waiting:
            for reader in self._readers.get(waiting.pop(), []):
                if reader in layers:
                    return True
                if reader.type in (*_MOVES, "dequantize"):
                    waiting += [one.name for one in reader.outputs]
        return False


def _inputs(operation: Any, name: str = "") -> Iterator[str]:
    """Names of the values that an operation reads (as the argument `name`)."""
    for key, argument in operation.inputs.items():
        if not name or key == name:
            yield from (one.name for one in argument.arguments if one.name)
