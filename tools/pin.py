"""Print `name==version` for everything that the given extras bring, as installed here.

    .venv/bin/python tools/pin.py all dev > constraints.txt

Local versions (`+cpu`) are cut, so that one file serves every build of torch.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def requirements_of(name: str, extras: frozenset[str]) -> list[Requirement]:
    """Return what a distribution (this project read from pyproject.toml) needs on this machine."""
    if name == "diffoundry":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        lines = list(project["dependencies"])
        for extra in extras:
            lines += project["optional-dependencies"][extra]
        return [Requirement(line) for line in lines]
    wanted = [Requirement(line) for line in distribution(name).requires or []]
    environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
    return [
        each
        for each in wanted
        if each.marker is None or any(each.marker.evaluate(env) for env in environments)
    ]


def closure(extras: frozenset[str]) -> dict[str, str]:
    """Return normalised name -> installed version of everything `diffoundry[extras]` needs.

    Raises PackageNotFoundError when one of them is not installed.
    """
    todo = [("diffoundry", extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    versions: dict[str, str] = {}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node[0] != "diffoundry":
            versions[node[0]] = distribution(node[0]).version.split("+")[0]
        for each in requirements_of(*node):
            todo.append((canonicalize_name(each.name), frozenset(each.extras)))
    return dict(sorted(versions.items()))


if __name__ == "__main__":
    try:
        pins = closure(frozenset(sys.argv[1:]))
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed here") from error
    print("\n".join(f"{name}=={version}" for name, version in pins.items()))
