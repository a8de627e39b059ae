"""How an artifact is opened: by its own runtime, by a stand-in, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    DiffoundryError,
    MissingToolError,
)
from diffoundry.sessions import Opening, choose_opening
from diffoundry.types import Artifact, ArtifactType, HasStandIn, ShapePolicy
from tests.core.parity import fakes
from tests.core.stand_ins import NATIVE, UNDERSTUDY, Elsewhere, named

ARTIFACT = Artifact(ArtifactType("onnx", "fp32"), Path("engine"), "sha256:0", "unet")


class Understudy:
    tools = ("numpy",)
    extra = "onnx"

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.session = fakes.FakeSession()

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == "onnx"

    def unavailable(self, device: str) -> Exception | None:
        return self.problem

    def open(self, artifact: Any, contract: Any, device: str, threads: int = 0) -> Any:
        return self.session


def opening(native: Any, understudy: Any, artifact: Artifact = ARTIFACT) -> Opening:
    return choose_opening(named(native, understudy), NATIVE, artifact, fakes.CONTRACT)


def test_the_native_runtime_is_used_wherever_it_can_run() -> None:
    understudy = Understudy()
    native = Elsewhere(understudy, problem=None)
    found = opening(native, understudy)
    assert found.runtime is native and found.stand_in is None and found.deferred is None


def test_a_deferred_runtime_gives_way_to_its_stand_in() -> None:
    understudy = Understudy()
    native = Elsewhere(understudy)
    assert isinstance(native, HasStandIn) and not isinstance(understudy, HasStandIn)
    found = opening(native, understudy)
    assert found.runtime is understudy and found.native == NATIVE
    assert found.stand_in is not None and found.stand_in.runtime == UNDERSTUDY
    assert found.deferred is native.problem
    feeds = fakes.make_recording().calls[0].feeds
    assert set(found.open().infer(feeds)) == {"model_output"}


def test_a_missing_package_is_not_replaced_by_a_stand_in() -> None:
    understudy = Understudy()
    found = opening(Elsewhere(understudy, MissingToolError("bindings")), understudy)
    assert found.stand_in is None
    with pytest.raises(MissingToolError):
        found.open()


def test_where_the_stand_in_cannot_run_either_it_is_deferred_and_both_remedies_are_said() -> None:
    lacking = MissingToolError("torch", found="not installed", remedy="pip install torch")
    found = opening(Elsewhere(Understudy()), Understudy(lacking))
    assert found.stand_in is None
    with pytest.raises(DeferredError) as caught:
        found.open()
    text = caught.value.text()
    assert "use that host" in text and "pip install torch" in text and UNDERSTUDY in text


def test_a_stand_in_that_is_not_there_at_all_defers() -> None:
    def runtime_named(name: str) -> Any:
        if name == UNDERSTUDY:
            raise DiffoundryError(f"runtime {name!r}", found="no such runtime")
        return Elsewhere(Understudy())

    with pytest.raises(DeferredError, match="no such runtime"):
        choose_opening(runtime_named, NATIVE, ARTIFACT, fakes.CONTRACT).open()


def test_a_damaged_file_is_not_deferred() -> None:
    native = Elsewhere(Understudy(), damaged=ArtifactError("engine", found="truncated"))
    with pytest.raises(ArtifactError, match="truncated"):
        opening(native, Understudy()).open()


def test_the_wrong_runtime_is_an_error_even_where_it_is_deferred() -> None:
    foreign = Artifact(ArtifactType("tflite"), Path("engine"), "sha256:0")
    with pytest.raises(ArtifactError, match="cannot open"):
        opening(Elsewhere(Understudy()), Understudy(), foreign).open()


def test_a_stand_in_is_held_to_the_shapes_that_the_engine_promises() -> None:
    fixed = ShapePolicy("fixed", (tuple(sorted(fakes.SMALLEST.items())),))
    artifact = Artifact(ArtifactType("onnx", "fp32", fixed), Path("engine"), "sha256:0")
    session = opening(Elsewhere(Understudy()), Understudy(), artifact).open()
    with pytest.raises(ContractError, match="fixed shapes"):
        session.infer(fakes.make_recording().calls[0].feeds)
