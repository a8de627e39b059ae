"""Feeds of the component's dtypes reach an engine whose edges are narrower; others are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from diffoundry.errors import ContractError
from diffoundry.sessions import CheckedSession, fit_feeds
from diffoundry.types import Array, Contract, TensorSpec

COMPONENT = Contract(
    "unet",
    (TensorSpec("ids", "int64", (2,)), TensorSpec("sample", "float32", (3,))),
    (TensorSpec("out", "float32", (3,)),),
    (),
)
ENGINE = dataclasses.replace(
    COMPONENT, inputs=(TensorSpec("ids", "int32", (2,)), TensorSpec("sample", "float16", (3,)))
)
FEEDS = {"ids": np.array([1, 2]), "sample": np.ones(3, np.float32)}


class Remembering:
    def __init__(self) -> None:
        self.dtypes: dict[str, str] = {}

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.dtypes = {name: str(array.dtype) for name, array in feeds.items()}
        return {"out": np.zeros(3, np.float32)}

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        return self.infer(feeds)

    def precision_used(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def inner() -> Remembering:
    return Remembering()


@pytest.fixture
def session(inner: Remembering) -> CheckedSession:
    return CheckedSession(inner, ENGINE, component=COMPONENT)


@pytest.mark.parametrize("feeds", [FEEDS, fit_feeds(FEEDS, ENGINE)], ids=["component", "engine"])
@pytest.mark.parametrize("method", ["infer", "probe"])
def test_both_the_components_dtypes_and_the_engines_are_taken(
    session: CheckedSession, inner: Remembering, feeds: dict[str, Array], method: str
) -> None:
    getattr(session, method)(feeds)
    assert inner.dtypes == {"ids": "int32", "sample": "float16"}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("sample", np.ones(3, np.float64)),
        ("sample", np.ones(3, np.int64)),
        ("ids", np.array([1, 2], np.int16)),
        ("ids", np.array([1.0, 2.0])),
    ],
)
def test_a_dtype_that_neither_declares_is_refused(
    session: CheckedSession, name: str, array: Array
) -> None:
    with pytest.raises(ContractError, match=f"{name} is {array.dtype}"):
        session.infer({**FEEDS, name: array})


def test_values_that_do_not_fit_the_narrower_type_are_refused(session: CheckedSession) -> None:
    with pytest.raises(ContractError, match="fit the engine's int32"):
        session.infer({**FEEDS, "ids": np.array([1, 2**31])})
