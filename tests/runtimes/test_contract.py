"""What every runtime is, found by listing the folder: light, honest about what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffoundry import discovery
from diffoundry.errors import (
    ArtifactError,
    DeferredError,
    DiffoundryError,
    MissingToolError,
    UsageError,
)
from diffoundry.types import Artifact, ArtifactType, Runtime
from tests.compilers.small_network import CONTRACT

RUNTIMES = sorted(discovery.discover_runtimes().items())
each_runtime = pytest.mark.parametrize(
    ("name", "runtime"), RUNTIMES, ids=[name for name, _ in RUNTIMES]
)


@each_runtime
def test_a_runtime_keeps_the_contract(name: str, runtime: Runtime) -> None:
    assert isinstance(runtime, Runtime)
    assert dataclasses.is_dataclass(runtime)
    assert type(runtime).__name__.lower() == name.replace("_", "")
    assert runtime.tools and runtime.extra


@each_runtime
def test_a_runtime_refuses_types_that_it_does_not_take(name: str, runtime: Runtime) -> None:
    foreign = ArtifactType("a kind that nobody makes")
    assert not runtime.accepts(foreign)
    if runtime.unavailable("cpu") is None:
        with pytest.raises(ArtifactError):
            runtime.open(Artifact(foreign, Path("nowhere"), ""), CONTRACT, "cpu")


@each_runtime
def test_a_missing_device_is_an_error_of_the_right_kind(name: str, runtime: Runtime) -> None:
    assert isinstance(runtime.unavailable("abacus"), UsageError)
    problem = runtime.unavailable("cuda")
    assert problem is None or isinstance(problem, (MissingToolError, DeferredError, UsageError))
    assert problem is None or isinstance(problem, DiffoundryError)


def test_the_runtimes_of_this_issue_are_found() -> None:
    assert {"onnx_session", "torch_eager"} <= {name for name, _ in RUNTIMES}
