"""What every stage of compilers/ and exporters/ is: a frozen dataclass that keeps the protocol."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from diffoundry import discovery
from diffoundry.types import ArtifactType, Stage

STAGES = [
    (name, cls)
    for name, cls in discovery.discover_stages().items()
    if cls.__module__.split(".")[1] in ("compilers", "exporters")
]


@pytest.mark.parametrize(("name", "cls"), STAGES, ids=[name for name, _ in STAGES])
def test_a_stage_keeps_the_contract(name: str, cls: type[Any]) -> None:
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    stage = cls()
    assert isinstance(stage, Stage)
    assert cls.__name__.lower() == name.replace("_", "")
    assert stage.tools and all(isinstance(tool, str) for tool in stage.tools)
    assert isinstance(stage.extra, str) and stage.extra
    assert all(isinstance(t, ArtifactType) for types in stage.inputs().values() for t in types)
    assert all(isinstance(t, ArtifactType) for t in stage.outputs().values())
    assert stage.inputs() and stage.outputs()
    # Options reach the key as plain data.
    assert cls(**dataclasses.asdict(stage)) == stage
    assert (cls.__doc__ or "").strip()


def test_the_stages_of_this_issue_are_found() -> None:
    names = {name for name, _ in STAGES}
    assert {"exported_program_from_torch", "onnx_from_exported_program"} <= names
