"""Runs the command line as a user does: in its own process, with its own store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "diffoundry.cli.main")


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "DIFFOUNDRY_CACHE": str(cache), "COLUMNS": "160"}


def start(cache: Path, *arguments: object) -> subprocess.Popen[str]:
    """A running command whose output can be read line by line."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(cache: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = start(cache, *arguments)
    output, _ = process.communicate()
    return process.returncode, output


def run_json(cache: Path, *arguments: object) -> tuple[int, Any]:
    """Exit code and the JSON document on standard output."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json"],
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout)


def files_of(bundle: Path) -> dict[str, bytes]:
    """Path in the bundle -> contents, evidence/ left out."""
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and "evidence" not in path.relative_to(bundle).parts
    }
