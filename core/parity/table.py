"""The parity table as rows of strings, for the command line, JSON and the bundle's README."""

from __future__ import annotations

from collections.abc import Sequence

from diffoundry.parity.limits import allowed_max_abs, strain
from diffoundry.types import CheckResult, ParityResult

COLUMNS = ("check", "component", "figure", "limit", "floor", "status")


def rows(results: Sequence[ParityResult]) -> list[tuple[str, ...]]:
    """One row per check in the order of `COLUMNS`; a result without checks is a failed row."""
    table: list[tuple[str, ...]] = []
    for result in results:
        table += [_row(check) for check in result.checks]
        if not result.checks:
            table.append(("none", result.subject, "no check ran", "", "", "failed"))
    return table


def condensed_rows(results: Sequence[ParityResult]) -> list[tuple[str, ...]]:
    """Rows where passed checks of one level and component share a line; others keep theirs.

    The shared line shows the check that is nearest to its limit, and how many there are.
    """
    table: list[tuple[str, ...]] = []
    for result in results:
        groups: dict[tuple[str, str | None], list[CheckResult]] = {}
        for check in result.checks:
            if check.status == "passed":
                groups.setdefault((check.level, check.component), []).append(check)
        for check in result.checks:
            group = groups.get((check.level, check.component), [])
            if check.status != "passed":
                table.append(_row(check))
            elif check is group[0]:
                row = _row(max(group, key=_used_share))
                name = f"{check.level}: worst of {len(group)}" if len(group) > 1 else row[0]
                table.append((name, *row[1:]))
        if not result.checks:
            table += rows([result])
    return table


def _used_share(check: CheckResult) -> float:
    """How much of its limit a check uses: 1 is at the limit."""
    if check.measure is None or check.limits is None:
        return 0.0
    return strain(check.measure, check.limits)


def messages(results: Sequence[ParityResult]) -> list[str]:
    """What stands beside the table: one line for each thing that checks say.

    What several components' checks say in the same words is said once, with all their names.
    """
    said: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for check in result.checks:
            if check.message:
                key = (check.status, _name(check), check.message)
                said.setdefault(key, []).append(check.component or result.subject)
    return [
        f"{status}: {name} of {', '.join(dict.fromkeys(subjects))}: {message}"
        for (status, name, message), subjects in said.items()
    ]


def summary(result: ParityResult) -> str:
    """ "unet: passed, 12 checks" or "unet: failed, 2 of 12 checks"."""
    count = len(result.checks)
    by = next((str(c.values["stand_in"]) for c in result.checks if "stand_in" in c.values), None)
    if by is not None and not result.failed:
        waiting = sum(check.status == "deferred" for check in result.checks)
        return f"{result.subject}: {count - waiting} checks passed by {by}, {waiting} deferred"
    for status in ("failed", "deferred"):
        hits = sum(check.status == status for check in result.checks)
        if hits:
            return f"{result.subject}: {status}, {hits} of {count} checks"
    return f"{result.subject}: {'passed' if result.passed else 'failed'}, {count} checks"


def _row(check: CheckResult) -> tuple[str, ...]:
    floor = check.measure.floor if check.measure else None
    return (
        _name(check),
        check.component or "pipeline",
        figure(check),
        limit(check),
        "" if floor is None else f"{floor:.2g}",
        check.status,
    )


def _name(check: CheckResult) -> str:
    return check.level if check.name == check.level else f"{check.level}: {check.name}"


def figure(check: CheckResult) -> str:
    """The measured figures in one cell: those that are limited, in the limits' order."""
    parts = []
    measure, limits = check.measure, check.limits
    if measure is not None:
        if "norm_ratio" in check.values:
            parts += [f"cosine {measure.cosine:.6f}", f"size × {check.values['norm_ratio']:.3f}"]
        else:
            limited = limits is not None and limits.sqnr_db is not None
            sqnr = f"{measure.sqnr_db:.{1 if limited else 0}f} dB SQNR"
            parts += [f"max_abs {measure.max_abs:.2e}", sqnr]
            if limits is not None and limits.cosine is not None:
                parts.append(f"cosine {measure.cosine:.6f}")
            own = "worst_psnr_db" in check.values
            if limits is not None and limits.psnr_db is not None and not own:
                parts.append(f"PSNR {measure.psnr_db:.1f} dB")
    parts += [
        form.format(check.values[key]) for key, form in SHOWN_VALUES.items() if key in check.values
    ]
    if "stand_in" in check.values:
        parts.append(f"the other checks ran by {check.values['stand_in']}")
    if "computes_in" in check.values:
        parts.append(", ".join(check.values["computes_in"]) or "not said")
    if "sick_calls" in check.values:
        parts.append(f"{check.values['sick_calls']} of {check.values['calls']} calls")
    return ", ".join(parts)


SHOWN_VALUES = {
    "worst_psnr_db": "PSNR worst {:.4g} dB",
    "mean_psnr_db": "mean {:.4g} dB",
    "worst_ssim": "SSIM worst {:.4g}",
    "mean_ssim": "mean {:.4g}",
    "reference_accuracy": "right in the original {:.1%}",
    "engine_accuracy": "here {:.1%}",
    "planned": "{} layers planned",
    "stored": "{} in the file",
    "executed": "{} executed",
    "drop_bound_95": "drop ≤ {:.1%} (95 % bound)",
}
"""Numbers of `CheckResult.values` that belong in the figure's cell, where they are there."""


def limit(check: CheckResult) -> str:
    """What the figures are held against, in one cell."""
    limits = check.limits
    if limits is None:
        return ""
    parts = []
    allowed = allowed_max_abs(check.measure, limits) if check.measure else limits.max_abs
    if allowed is not None:
        parts.append(f"max_abs ≤ {allowed:.2e}")
    for name, unit in (("cosine", ""), ("psnr_db", " dB"), ("sqnr_db", " dB"), ("ssim", "")):
        least = getattr(limits, name)
        if least is not None:
            shown = f"{least:.4g}" if unit else f"{least:g}"
            parts.append(f"{name.removesuffix('_db')} ≥ {shown}{unit}")
    if "norm_tolerance" in check.values:
        parts.append(f"size within {100 * check.values['norm_tolerance']:g} %")
    if limits.prompt_accuracy_drop is not None:
        parts.append(f"accuracy drop ≤ {limits.prompt_accuracy_drop:g}")
    return ", ".join(parts)
