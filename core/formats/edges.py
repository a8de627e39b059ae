"""What a mobile format makes of a contract: its edges' dtypes, and the shapes it lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from diffoundry.types import Contract, ShapePolicy, TensorSpec

ON_DEVICE: Mapping[str, str] = MappingProxyType({"int64": "int32", "float64": "float32"})
"""Core ML has no edges of 64 bits, and litert-torch narrows them: most accelerators have none."""


def engine_contract(contract: Contract) -> Contract:
    """The contract of the converted file: 32 bits where 64 stood."""

    def narrowed(spec: TensorSpec) -> TensorSpec:
        return dataclasses.replace(spec, dtype=ON_DEVICE.get(spec.dtype, spec.dtype))

    return dataclasses.replace(
        contract,
        inputs=tuple(narrowed(spec) for spec in contract.inputs),
        outputs=tuple(narrowed(spec) for spec in contract.outputs),
    )


def own_shapes(contract: Contract, policy: ShapePolicy) -> tuple[dict[str, int], ...]:
    """The policy's shapes on the axes that the component has, each once, the usual first.

    A policy without shapes has the usual one.
    """
    usual = contract.opt_shape()
    shapes: list[dict[str, int]] = []
    for shape in (dict(one) for one in policy.shapes or (usual.items(),)):
        own = {axis.name: shape[axis.name] for axis in contract.axes}
        if own not in shapes:
            shapes.append(own)
    return tuple(sorted(shapes, key=lambda shape: shape != usual))
