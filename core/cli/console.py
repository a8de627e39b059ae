"""Where commands print: tables and notes through rich, documents as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A console that keeps tables whole when its output is piped."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 140, soft_wrap=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    from diffoundry.formats.canonical import plain

    print(json.dumps(plain(document), indent=2, sort_keys=True, ensure_ascii=False))
