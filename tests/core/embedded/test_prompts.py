"""The committed splits: disjoint, of the promised sizes, and made by the code beside them."""

from itertools import combinations

import pytest

from diffoundry.embedded.prompts import SPLIT_SIZES, load_split, make_splits
from diffoundry.embedded.scenes import parse


@pytest.mark.parametrize(("name", "size"), list(SPLIT_SIZES.items()))
def test_a_split_has_distinct_scenes_and_seeds(name: str, size: int) -> None:
    pairs = load_split(name)
    assert len(pairs) == size
    assert len({parse(pair.prompt) for pair in pairs}) == size
    assert len({pair.seed for pair in pairs}) == size
    assert all(0 <= pair.seed < 2**31 for pair in pairs)


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLIT_SIZES, 2)))
def test_two_splits_share_neither_prompt_nor_seed(one: str, other: str) -> None:
    first, second = load_split(one), load_split(other)
    assert not {pair.prompt for pair in first} & {pair.prompt for pair in second}
    assert not {pair.seed for pair in first} & {pair.seed for pair in second}


def test_the_committed_file_is_what_the_code_makes() -> None:
    assert {name: load_split(name) for name in SPLIT_SIZES} == make_splits()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="known: calibration, tuning, evaluation"):
        load_split("test")
