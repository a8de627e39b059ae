"""Show the root folders as the one package they become: `build/tree/diffoundry/...`, all links.

mypy and import-linter do not follow an editable install that maps folders to packages; with
`build/tree` on their path they see `diffoundry.types`, `diffoundry.exporters`, ... in place.
Run it again when an entry was added to or removed from `core/`; it only changes what differs.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def wanted_links() -> dict[str, Path]:
    """Return link name (below `build/tree`) -> the file or folder it points at."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    links: dict[str, Path] = {}
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        name = package.replace(".", "/")
        if "/" in name:
            entries = {name: ROOT / folder}
        else:
            entries = {f"{name}/{entry.name}": entry for entry in (ROOT / folder).iterdir()}
            entries.pop(f"{name}/__pycache__", None)
        clash = sorted(links.keys() & entries.keys())
        if clash:
            raise SystemExit(f"{clash[0]}: both in core/ and a root folder; rename one of them")
        links |= entries
    return links


def refresh(tree: Path) -> None:
    """Make `tree` hold exactly the wanted links, relative ones, so that a checkout can move."""
    links = wanted_links()
    for old in tree.glob("*/*"):
        # Python leaves a folder of bytecode there when something is run from the tree.
        if old.name != "__pycache__" and old.relative_to(tree).as_posix() not in links:
            old.unlink()
    for name, target in links.items():
        link = tree / name
        link.parent.mkdir(parents=True, exist_ok=True)
        points_at = os.path.relpath(target, link.parent)
        if link.is_symlink() and os.readlink(link) == points_at:
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(points_at)


if __name__ == "__main__":
    refresh(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "tree")
