"""The operations by name: what each takes, and the function that computes it.

A function's parameters are named as in MIL; its annotations say how an argument reaches it:
`Tensor` (floats widened to float32), `Tensors` (a tuple), `int`, `float`, `bool`, `str`, `Ints`,
`Bools` (plain values), `Opset` (the program's opset, 7 for iOS 17; it is no argument). What it
returns is then stored in the type that the program states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Ints = tuple[int, ...]
Bools = tuple[bool, ...]
Opset = int

Function = Callable[..., Any]


@dataclass(frozen=True)
class Parameter:
    """How one argument is passed: `form` is the annotation without "| None"."""

    form: str
    required: bool


@dataclass(frozen=True)
class Entry:
    """A registered operation. `moves_data`: values pass through unchanged, in their own type."""

    function: Function
    parameters: Mapping[str, Parameter]
    moves_data: bool

    @property
    def takes_opset(self) -> bool:
        return any(p.form == "Opset" for p in self.parameters.values())


_FORMS = {"Tensor", "Tensors", "int", "float", "bool", "str", "Ints", "Bools", "Opset"}
_OPERATIONS: dict[str, Entry] = {}


def operation(*names: str, moves_data: bool = False) -> Callable[[Function], Function]:
    """Register the decorated function as the MIL operation(s) `names` (its own name by default)."""

    def register(function: Function) -> Function:
        parameters = {
            name: Parameter(
                str(parameter.annotation).removesuffix(" | None"),
                parameter.default is inspect.Parameter.empty,
            )
            for name, parameter in inspect.signature(function).parameters.items()
        }
        unknown = {parameter.form for parameter in parameters.values()} - _FORMS
        if unknown:
            raise TypeError(f"{function.__name__}: no argument is passed as {unknown}")
        for name in names or (function.__name__,):
            if name in _OPERATIONS:
                raise ValueError(f"operation {name} is registered twice")
            _OPERATIONS[name] = Entry(function, parameters, moves_data)
        return function

    return register


def operations() -> Mapping[str, Entry]:
    """Every operation by its MIL name. Imports torch."""
    from diffoundry.runtimes.mil import (  # noqa: F401 - importing a theme registers it
        activation,
        compression,
        elementwise,
        indexing,
        linear,
        normalization,
        reduction,
        resizing,
        tensor,
    )

    return _OPERATIONS
