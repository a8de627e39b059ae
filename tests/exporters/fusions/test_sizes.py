"""Sizes of values inside a graph, at every shape of its contract."""

from __future__ import annotations

from diffoundry.exporters.fusions.sizes import Sizes, sizes_of
from tests.exporters.fusions import fusible


def test_sizes_are_those_of_the_usual_shape() -> None:
    sizes = sizes_of(fusible.fp32().path, fusible.CONTRACT)
    assert sizes.usual("/large/Conv") == (1, fusible.WIDE, 32, 32)
    assert sizes.usual("/self_attention/to_q/Add") == (1, 256, fusible.WIDE)
    assert sizes.usual("nothing") is None


def test_a_multiple_is_one_at_every_shape() -> None:
    sizes = sizes_of(fusible.fp32().path, fusible.CONTRACT)
    assert sizes.multiple_of("/large/Conv", 2, 2)
    assert not sizes.multiple_of("/large/Conv", 2, 4)  # 32 is, 6 is not
    assert not sizes.multiple_of("/small/Conv", 3, 2)
    assert not sizes.multiple_of("nothing", 0, 1)


def test_integer_operators_of_onnxruntime_do_not_end_what_is_known() -> None:
    sizes = sizes_of(fusible.int8().path, fusible.CONTRACT)
    assert sizes.usual("/up/Conv") == (1, fusible.WIDE, 32, 32)
    assert sizes.usual("/gate/MatMulIntegerToFloat") == (1, 256, 2 * fusible.WIDE)


def test_a_new_value_has_the_sizes_of_the_old_one() -> None:
    sizes = Sizes({"old": (2, 4)}, [{"old": (4, 8)}])
    sizes.same("new", "old")
    sizes.same("newer", "new")
    assert sizes.usual("newer") == (2, 4) and sizes.multiple_of("newer", 1, 4)
