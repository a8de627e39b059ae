"""What `verify` says at its end."""

from __future__ import annotations

import pytest

from diffoundry.cli.verify import _not_checked, _still_deferred
from diffoundry.parity.checks.shape_range import NOT_VISITED
from diffoundry.types import CheckResult, ParityResult
from diffoundry.verifying import VerifyReport


@pytest.mark.parametrize(("count", "words"), [(0, ""), (2, ", 2 checks still DEFERRED")])
def test_what_was_let_through_is_said_beside_passed(count: int, words: str) -> None:
    checks = (CheckResult("call", "one", "passed"),)
    deferred = tuple(CheckResult("device", str(i), "deferred") for i in range(count))
    report = VerifyReport("sha256:0", ParityResult("files", checks + deferred), ())
    assert _still_deferred(report) == words


def test_sizes_that_no_build_checks_are_said_beside_passed() -> None:
    marks = [
        CheckResult("shape_range", f"at {size}", "info", part, values={NOT_VISITED: True})
        for part, size in (("unet", "width=1024"), ("unet", "batch=4"), ("vae", "batch=4"))
    ]
    report = VerifyReport("sha256:0", ParityResult("files", tuple(marks)), ())
    assert _not_checked(report) == "; NOT checked: batch=4, width=1024"
    assert _not_checked(VerifyReport("sha256:0", ParityResult("files", ()), ())) == ""
