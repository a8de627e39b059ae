"""One form for every error a user sees: where, expected, found, what to do."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the command line exits with."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MISSING_TOOL = 3
    DEFERRED = 4
    INTERRUPTED = 130


# Worst first: the exit code of a run with several outcomes is the earliest of these.
SEVERITY = (
    ExitCode.INTERRUPTED,
    ExitCode.USAGE,
    ExitCode.FAILED,
    ExitCode.MISSING_TOOL,
    ExitCode.DEFERRED,
    ExitCode.DONE,
)


def worst(codes: list[ExitCode]) -> ExitCode:
    """Return the most severe of `codes` (`DONE` when there are none)."""
    return min(codes, key=SEVERITY.index, default=ExitCode.DONE)


class DiffoundryError(Exception):
    """An error a user can act on.

    `where` names the file, stage, component or option; `expected` and `found` say what the
    difference is; `remedy` says what to do next.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(
        self, where: str, *, expected: str = "", found: str = "", remedy: str = ""
    ) -> None:
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self.text())

    def text(self) -> str:
        """The error on up to four lines, empty parts left out."""
        parts = [self.where]
        for label, value in (
            ("expected", self.expected),
            ("found", self.found),
            ("what to do", self.remedy),
        ):
            if value:
                parts.append(f"  {label}: {value}")
        return "\n".join(parts)

    def as_json(self) -> dict[str, str | int]:
        """The same parts for `--json`."""
        return {
            "kind": type(self).__name__,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "what_to_do": self.remedy,
            "exit_code": int(self.exit_code),
        }


class UsageError(DiffoundryError):
    """A wrong argument, option or output folder."""

    exit_code = ExitCode.USAGE


class ProfileError(DiffoundryError):
    """A profile that cannot be used; all its mistakes stand in one error."""

    exit_code = ExitCode.USAGE


class ModelError(DiffoundryError):
    """A model that cannot be read, is not supported, or is itself at fault."""

    exit_code = ExitCode.USAGE


class ContractError(DiffoundryError):
    """Feeds or outputs that do not fit a component's declared contract."""


class StageError(DiffoundryError):
    """A stage or one of its tools failed."""


class ArtifactError(DiffoundryError):
    """A file on disk that is damaged, foreign, or not what its type says."""


class BundleError(DiffoundryError):
    """A bundle that cannot be trusted or read."""


class MissingToolError(DiffoundryError):
    """A package that an install line would bring is not there."""

    exit_code = ExitCode.MISSING_TOOL


class DeferredError(DiffoundryError):
    """Something only the target host has (a driver, an operating system, a device)."""

    exit_code = ExitCode.DEFERRED
