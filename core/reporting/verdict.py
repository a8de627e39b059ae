"""What the evidence of all hosts says together: the worst status, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffoundry.artifacts.bundle import Bundle
from diffoundry.artifacts.evidence import Evidence, read_evidence
from diffoundry.artifacts.manifest import EVIDENCE
from diffoundry.errors import BundleError
from diffoundry.parity.checks.shape_range import sizes_not_checked
from diffoundry.types import ParityResult

Status = Literal["passed", "failed", "deferred", "not checked"]
WORST_FIRST: tuple[Status, ...] = ("failed", "not checked", "deferred", "passed")
TITLES = {
    "passed": "Passed",
    "failed": "Failed",
    "deferred": "Incomplete",
    "not checked": "Not checked",
}


@dataclass(frozen=True)
class Verdict:
    """The worst status of all variants; `sentence` says what it rests on."""

    status: Status
    sentence: str
    variants: dict[str, Status]

    @property
    def title(self) -> str:
        return TITLES[self.status]


def read_all(bundle: Bundle) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """The evidence of this manifest from every host, and a line on each file that is not used."""
    found, notes = [], []
    for path in sorted((bundle.path / EVIDENCE).glob("*.json")):
        try:
            one = read_evidence(path)
        except BundleError as error:
            notes.append(f"{EVIDENCE}/{path.name} cannot be read: {error.found}")
            continue
        if one.manifest_digest == bundle.digest:
            found.append(one)
        else:
            notes.append(f"{EVIDENCE}/{path.name} is about another manifest: it is not shown")
    return tuple(found), tuple(notes)


def judge(bundle: Bundle, evidence: Sequence[Evidence]) -> Verdict:
    """The verdict over every variant of the manifest, those without evidence included."""
    variants = {v.name: _variant_status(v.name, evidence) for v in bundle.manifest.variants}
    status = min(variants.values(), key=WORST_FIRST.index)
    return Verdict(status, _sentence(status, variants, evidence), variants)


def result_status(result: ParityResult) -> Status:
    """One result's status; it fails closed."""
    return "passed" if result.passed else "failed" if result.failed else "deferred"


def _variant_status(name: str, evidence: Sequence[Evidence]) -> Status:
    """A failure anywhere counts; what one host deferred, another may have completed."""
    subjects: dict[str, set[Status]] = {}
    for one in evidence:
        if name in one.variants:
            for result in one.variants[name].results:
                subjects.setdefault(result.subject, set()).add(result_status(result))
    if not subjects:
        return "not checked"
    order: tuple[Status, ...] = ("failed", "passed", "deferred")
    merged = [min(found, key=order.index) for found in subjects.values()]
    return min(merged, key=WORST_FIRST.index)


def _sentence(status: Status, variants: dict[str, Status], evidence: Sequence[Evidence]) -> str:
    checks = [
        check
        for one in evidence
        for name, variant in one.variants.items()
        if name in variants
        for result in variant.results
        for check in result.checks
    ]
    hosts = ", ".join(one.host.name for one in evidence) or "no host"
    named = ", ".join(name for name, found in variants.items() if found == status)
    if status == "passed":
        decided = sum(check.status == "passed" for check in checks)
        counted = {1: "the variant", 2: "both variants"}
        which = counted.get(len(variants), f"all {len(variants)} variants")
        return (
            f"{decided} checks against the PyTorch original, and {which} kept every limit "
            f"(measured on {hosts}{sizes_not_checked(checks)})."
        )
    if status == "not checked":
        return f"No evidence of {named} for this manifest. diffoundry verify --complete adds it."
    count = sum(check.status == status for check in checks)
    of = f"{count} of {len(checks)} checks"
    if status == "failed":
        return f"{of} failed ({named}; measured on {hosts}). Do not ship this bundle."
    return f"Nothing failed, but {of} could not run yet ({named}): they need another host."
