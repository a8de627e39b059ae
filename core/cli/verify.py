"""`diffoundry verify`: whether a bundle is whole and its engines still compute the original."""

from __future__ import annotations

from pathlib import Path

from diffoundry.cli.console import console, print_json
from diffoundry.errors import ExitCode
from diffoundry.verifying import VerifyReport, verify, write_junit


def run_verify(
    bundle: Path,
    variant: str | None,
    junit: Path | None,
    allow_deferred: bool,
    complete: bool,
    as_json: bool,
    full: bool,
) -> ExitCode:
    """Verify and print. Exit 0 passed, 1 failed, 3 a tool is missing, 4 only deferred left."""
    progress = console(stderr=True)
    report = verify(
        bundle,
        variant=variant,
        complete=complete,
        allow_deferred=allow_deferred,
        say=lambda line: None if as_json else progress.print(line, style="dim", markup=False),
    )
    if junit is not None:
        write_junit(report, junit)
    if as_json:
        print_json(as_document(report))
    else:
        _print(report, full)
    return report.exit_code


def as_document(report: VerifyReport) -> dict[str, object]:
    """The `--json` document."""
    return {
        "exit_code": int(report.exit_code),
        "manifest_digest": report.digest,
        "files": report.files,
        "variants": [
            {
                "name": one.name,
                "exit_code": int(one.exit_code),
                "error": one.error.as_json() if one.error else None,
                "parity": one.results,
            }
            for one in report.variants
        ],
    }


def _print(report: VerifyReport, full: bool) -> None:
    from diffoundry.cli.tables import parity_notes, parity_table

    out = console()
    out.print(parity_table([report.files], title="files", full=True))
    for line in parity_notes([report.files]):
        out.print(line, highlight=False, markup=False)
    for one in report.variants:
        if one.error is not None:
            out.print(f"{one.name}: {one.error}", highlight=False, markup=False)
        if one.results:
            out.print(parity_table(one.results, title=f"parity of {one.name}", full=full))
            for line in parity_notes(one.results):
                out.print(line, highlight=False, markup=False)
    words = {
        ExitCode.DONE: "passed" + _still_deferred(report) + _not_checked(report),
        ExitCode.FAILED: "FAILED",
        ExitCode.MISSING_TOOL: "a tool is missing",
        ExitCode.DEFERRED: "only DEFERRED checks remain: finish them on a host that can run them",
    }
    out.print(f"verify: {words.get(report.exit_code, report.exit_code.name)}", highlight=False)
    if report.evidence is not None:
        out.print(f"written: {report.evidence}", highlight=False, markup=False)


def _still_deferred(report: VerifyReport) -> str:
    """What `--allow-deferred` let through, said beside "passed"."""
    count = sum(check.status == "deferred" for result in report.results for check in result.checks)
    return f", {count} checks still DEFERRED" if count else ""


def _not_checked(report: VerifyReport) -> str:
    from diffoundry.parity.checks.shape_range import sizes_not_checked

    return sizes_not_checked(check for result in report.results for check in result.checks)
