"""Every operation has a case, and registration refuses what it could not pass."""

from __future__ import annotations

import pytest

from diffoundry.runtimes.mil.registry import operation, operations
from tests.runtimes.mil import test_compression, test_elementwise, test_linear, test_tensor

THEMES = (test_compression, test_elementwise, test_linear, test_tensor)


def test_every_operation_is_held_to_its_definition() -> None:
    tested = {case.op for theme in THEMES for case in theme.CASES.values()}
    # coremltools cannot state the type of non_zero's result: tested by itself.
    assert set(operations()) - tested == {"non_zero"}
    assert not tested - set(operations())


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
