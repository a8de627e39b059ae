"""How a command ends that did not work: one message, and an exit code."""

from __future__ import annotations

import sys

from diffoundry.errors import DiffoundryError, ExitCode


def report(error: DiffoundryError) -> ExitCode:
    """Print an error, as JSON where that was asked for; returns its exit code."""
    if "--json" in sys.argv:
        import json

        print(json.dumps({"error": error.as_json()}, indent=2, sort_keys=True))
    else:
        complain(f"error: {error}")
    return error.exit_code


def usage_or_raise(error: Exception) -> ExitCode:
    """Click reports its own errors (wrong options) and aborts as exceptions."""
    name = type(error).__name__
    if name == "Abort":
        return ExitCode.INTERRUPTED
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return ExitCode.USAGE
    raise error


def complain(text: str) -> None:
    """One message on standard error."""
    print(text, file=sys.stderr)
