"""What `verify` says at its end."""

from __future__ import annotations

import pytest

from diffoundry.cli.verify import _still_deferred
from diffoundry.types import CheckResult, ParityResult
from diffoundry.verifying import VerifyReport


@pytest.mark.parametrize(("count", "words"), [(0, ""), (2, ", 2 checks still DEFERRED")])
def test_what_was_let_through_is_said_beside_passed(count: int, words: str) -> None:
    checks = (CheckResult("call", "one", "passed"),)
    deferred = tuple(CheckResult("device", str(i), "deferred") for i in range(count))
    report = VerifyReport("sha256:0", ParityResult("files", checks + deferred), ())
    assert _still_deferred(report) == words
