"""What the key of a check depends on beyond its inputs' bytes."""

from __future__ import annotations

import pytest

from diffoundry.building.node_keys import key_of
from diffoundry.planning.graph import Node
from diffoundry.runtimes.openvino_session import OpenvinoSession
from diffoundry.stages.check_component import CheckComponent


def check(precision: str) -> Node:
    options = {"runtime": "openvino_session", "device": "cpu", "precision": precision}
    inputs = {"engine": "a:model", "recording": "b:unet"}
    return Node(
        "check", "check_component", options, inputs, CheckComponent().outputs(), "unet", "w"
    )


def key(precision: str) -> str:
    return key_of(check(precision), {"engine": "sha256:1", "recording": "sha256:2"}, {})


def test_equal_files_of_two_precisions_are_checked_each() -> None:
    """A decoder in INT8 is the same file whatever its other layers are computed in."""
    assert key("int8") != key("int8_bf16")


def test_what_a_processor_without_bfloat16_found_is_no_other_hosts_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {}
    for found in ("bf16", "fp32"):
        monkeypatch.setattr(
            OpenvinoSession,
            "computes_in",
            lambda _, precision, __, found=found: found if precision == "bf16" else precision,
        )
        keys[found] = key("bf16"), key("int8")
    assert keys["bf16"][0] != keys["fp32"][0] and keys["bf16"][1] == keys["fp32"][1]
