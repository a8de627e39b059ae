"""`diffoundry doctor`: what is here, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from diffoundry.cli.console import console, print_json
from diffoundry.discovery import discover_runtimes, discover_stages, runtime_named
from diffoundry.errors import DeferredError, ExitCode, UsageError
from diffoundry.planning.planner import vocabulary
from diffoundry.profiles.reading import read_profile, shipped_profiles
from diffoundry.types import Runtime

RIVALS = ("onnxruntime", "onnxruntime-gpu")
"""They own the same files: having both breaks both."""


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_line(extras: list[str]) -> str:
    """The command that installs these extras."""
    names = {name for extra in extras for name in extra.split(",") if name}
    return f'pip install "diffoundry[{",".join(sorted(names))}]"'


def examine() -> dict[str, Any]:
    """Everything doctor knows, as data: host, stages, runtimes, problems, the install line."""
    stages = [
        _row(name, cls.tools, cls.extra, None) for name, cls in sorted(discover_stages().items())
    ]
    runtimes = []
    for name, runtime in sorted(discover_runtimes().items()):
        runtimes.append(_row(name, runtime.tools, runtime.extra, _deferred(runtime)))
    missing = [row["extra"] for row in stages + runtimes if row["missing"]]
    problems = []
    if all(installed(name) for name in RIVALS):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and own the same files: "
            "uninstall both, then install the extra onnx or onnx-gpu, never both"
        )
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "stages": stages,
        "runtimes": runtimes,
        "targets": _targets(stages, runtimes),
        "problems": problems,
        "install": install_line(missing) if missing else None,
    }


def _deferred(runtime: Runtime, devices: Sequence[str] = ("cpu", "cuda")) -> str | None:
    """Why a runtime is deferred on the first of `devices` that it has, or None."""
    problems = [runtime.unavailable(device) for device in devices]
    problem = next((one for one in problems if not isinstance(one, UsageError)), None)
    return str(problem) if isinstance(problem, DeferredError) else None


def _targets(stages: list[dict[str, Any]], runtimes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each shipped profile: ready, deferred, or the line that installs what it lacks."""
    rows = {row["name"]: row for row in stages + runtimes}
    targets = []
    for name in shipped_profiles():
        used = {"capture", "step_tables", "check_component", "check_pipeline"}
        deferred = []
        for variant in read_profile(name, vocabulary()).variants:
            routes = [variant.route, *variant.component_routes.values()]
            used |= {variant.runtime, *(step.stage for route in routes for step in route)}
            deferred += [_deferred(runtime_named(variant.runtime), [variant.device])]
        lacking = [rows[part] for part in sorted(used) if rows[part]["missing"]]
        targets.append(
            {
                "name": name,
                "missing": sorted({tool for row in lacking for tool in row["missing"]}),
                "deferred": next(filter(None, deferred), None),
                "install": install_line([row["extra"] for row in lacking]) if lacking else None,
            }
        )
    return targets


def _row(name: str, tools: tuple[str, ...], extra: str, deferred: str | None) -> dict[str, Any]:
    versions = {tool: installed(tool) for tool in tools}
    # What only the target host has is deferred there, whether or not its bindings are installed.
    missing = [tool for tool, version in versions.items() if version is None and not deferred]
    return {
        "name": name,
        "tools": versions,
        "missing": missing,
        "deferred": deferred,
        "extra": extra,
        "install": install_line([extra]) if missing and extra else None,
    }


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def run_doctor(as_json: bool) -> ExitCode:
    """Print the examination. Exit 1 when packages collide: a host need not have every tool."""
    found = examine()
    if as_json:
        print_json(found)
    else:
        _print(found)
    return ExitCode.FAILED if found["problems"] else ExitCode.DONE


def _print(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    out.print(
        f"diffoundry on Python {found['python']} ({sys.executable}), {found['system']}, "
        f"{found['cpus']} CPUs, {found['memory_bytes'] / 2**30:.1f} GiB",
        highlight=False,
    )
    table = Table("", "name", "state", "install with", box=None, pad_edge=False)
    for kind in ("stages", "runtimes", "targets"):
        for row in found[kind]:
            versions = row.get("tools", {}).items()
            state = ", ".join(f"{tool} {version}" for tool, version in versions) or "ready"
            if row["missing"]:
                state = f"missing: {', '.join(row['missing'])}"
            elif row["deferred"]:
                state = f"deferred: {row['deferred']}"
            cells = (kind.removesuffix("s"), row["name"], state, row["install"] or "")
            table.add_row(*map(escape, cells))
    out.print(table)
    for problem in found["problems"]:
        out.print(f"problem: {problem}", style="red")
    if found["install"]:
        out.print(f"to have everything: {found['install']}", highlight=False, markup=False)
