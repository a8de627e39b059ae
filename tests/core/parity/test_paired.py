"""Paired comparison against published and directly computed figures."""

from __future__ import annotations

from math import comb

import pytest

from diffoundry.errors import ContractError
from diffoundry.parity.paired import compare_paired, lower_bound, mcnemar_p, upper_bound


def test_mcnemar_is_the_exact_binomial_sum():
    worse, better = 8, 2
    tail = sum(comb(10, k) for k in range(better + 1)) / 2**10
    assert mcnemar_p(worse, better) == pytest.approx(2 * tail)
    assert mcnemar_p(0, 0) == 1.0


def test_bounds_are_clopper_pearsons():
    """The bound b of 0 hits in n solves (1 − b)^n = 2.5 %."""
    assert upper_bound(0, 20) == pytest.approx(1 - 0.025 ** (1 / 20))
    assert lower_bound(20, 20) == pytest.approx(0.025 ** (1 / 20))
    assert (upper_bound(20, 20), lower_bound(0, 20)) == (1.0, 0.0)


def test_discordant_pairs_decide_not_the_accuracies():
    same = compare_paired([True, False] * 8, [True, False] * 8)
    swapped = compare_paired([True, False] * 8, [False, True] * 8)
    assert same.reference_accuracy == swapped.engine_accuracy == 0.5
    assert (same.only_reference, same.only_engine) == (0, 0)
    assert (swapped.only_reference, swapped.only_engine) == (8, 8)
    assert same.drop_bound_95 < swapped.drop_bound_95 < 1


def test_the_bound_lies_above_the_drop_seen():
    found = compare_paired([True] * 10, [True] * 7 + [False] * 3)
    assert found.only_reference == 3
    assert found.drop_bound_95 > 0.3


@pytest.mark.parametrize(("left", "right"), [([], []), ([True], [])])
def test_nothing_to_compare_is_refused(left, right):
    with pytest.raises(ContractError):
        compare_paired(left, right)
