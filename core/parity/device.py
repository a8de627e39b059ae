"""The line that keeps a check by a stand-in from passing for a check on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from diffoundry.sessions import Opening
from diffoundry.types import CheckResult, ParityResult

LEVEL = "device"


def with_device_line(result: ParityResult, openings: Sequence[Opening]) -> ParityResult:
    """`result` and, where a stand-in opened any of the engines, one deferred line that says so.

    The line stands first, so that every figure below it is read as the stand-in's.
    """
    stood_in = [opening for opening in openings if opening.stand_in is not None]
    if not stood_in:
        return result
    component = result.checks[0].component if result.checks else None
    return dataclasses.replace(result, checks=(_line(stood_in[0], component), *result.checks))


def _line(opening: Opening, component: str | None) -> CheckResult:
    found, deferred = opening.stand_in, opening.deferred
    assert found is not None and deferred is not None
    lacks = f" ({deferred.found})" if deferred.found else ""
    return CheckResult(
        LEVEL,
        opening.native,
        "deferred",
        component,
        values={"stand_in": found.runtime, "note": found.note},
        message=(
            f"{found.note}. {opening.native} cannot run on this host{lacks}: the check by it is "
            "still to be done, by `diffoundry verify --complete` on a host that has it"
        ),
    )
