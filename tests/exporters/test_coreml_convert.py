"""Conversions do not depend on what coremltools did before in the same process."""

from __future__ import annotations

import pytest

from diffoundry.errors import StageError
from diffoundry.exporters.coreml_from_exported_program import CoremlFromExportedProgram
from diffoundry.types import ShapePolicy
from tests.exporters import tiny_coreml as tiny

DYNAMIC = CoremlFromExportedProgram(shape_policy=ShapePolicy())
FUNCTIONS = CoremlFromExportedProgram(
    precision="fp16",
    deployment_target="iOS18",
    shape_policy=tiny.policy((1, 16, 16), (2, 16, 16)),
)


@pytest.mark.parametrize("stage", [CoremlFromExportedProgram(), FUNCTIONS], ids=["one", "merged"])
def test_a_conversion_that_failed_changes_no_byte_of_the_next(
    stage: CoremlFromExportedProgram,
) -> None:
    wanted = tiny.convert(stage, tiny.work(), tiny.program()).digest
    with pytest.raises(StageError, match="Cannot add const"):
        tiny.convert(DYNAMIC, tiny.work(), tiny.program())
    assert tiny.convert(stage, tiny.work(), tiny.program()).digest == wanted
