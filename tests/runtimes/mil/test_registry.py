"""Every operation has a case, and registration refuses what it could not pass."""

from __future__ import annotations

import pytest

from diffoundry.planning.keys import imported_modules
from diffoundry.runtimes.mil.registry import operation, operations
from tests.runtimes.mil import test_compression, test_elementwise, test_linear, test_tensor

THEMES = (test_compression, test_elementwise, test_linear, test_tensor)


def test_every_operation_is_held_to_its_definition() -> None:
    tested = {case.op for theme in THEMES for case in theme.CASES.values()}
    # coremltools cannot state the type of non_zero's result: tested by itself.
    assert set(operations()) - tested == {"non_zero"}
    assert not tested - set(operations())


def test_a_change_of_any_operation_changes_the_key_of_a_check() -> None:
    themes = {f"diffoundry.runtimes.mil.{theme}" for theme in ("activation", "compression",
              "elementwise", "indexing", "linear", "normalization", "reduction", "resizing",
              "tensor")}  # fmt: skip
    assert themes <= set(imported_modules("diffoundry.runtimes.mil.registry"))
    assert "diffoundry.runtimes.mil.registry" in imported_modules("diffoundry.runtimes.mil.execute")
    assert {op.function.__module__ for op in operations().values()} == themes


def test_an_operation_is_registered_once() -> None:
    with pytest.raises(ValueError, match="relu is registered twice"):

        @operation("relu")
        def again(x: Tensor) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
            return x


def test_an_argument_that_nothing_can_pass_is_noticed() -> None:
    with pytest.raises(TypeError, match="odd: no argument is passed as"):

        @operation("odd")
        def odd(x: complex) -> None:
            del x
