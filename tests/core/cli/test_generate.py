"""generate: file names that a person recognises and that no two prompts share."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.cli.generate import file_name
from diffoundry.generation import Picture

LONG = "a very long story about " + "many " * 20


def name(prompt: str, seed: int = 7) -> str:
    return file_name(Picture(np.zeros((1, 1, 3), np.uint8), seed, {"prompt": prompt}))


def test_a_plain_prompt_is_the_name():
    assert name("a small red circle") == "a-small-red-circle-seed7.png"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG + "foxes", LONG + "geese"),
        ("\u7ea2\u8272", "\u84dd\u8272"),
        ("a, b", "a b"),
        ("", "!"),
    ],
)
def test_two_prompts_never_share_a_file(one, other):
    assert name(one) != name(other)
    assert name(one) != name(one, seed=8)
    assert len(name(one)) < 100 and "/" not in name(one)
