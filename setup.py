"""Lists the packages below the root folders of `[tool.setuptools.package-dir]`.

pyproject.toml can map folders to packages or search for packages, but not both; this is the
search. Everything else stands in pyproject.toml.
"""

import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def packages() -> list[str]:
    """Return every package (a folder with `__init__.py`) of the mapped root folders."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = []
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.append(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    return sorted(found)


setup(packages=packages())
