"""`diffoundry report`: one self-contained page about a bundle, to be forwarded."""

from __future__ import annotations

from pathlib import Path

from diffoundry.artifacts import disk
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.store import default_root
from diffoundry.cli.console import console, print_json
from diffoundry.errors import ExitCode, UsageError
from diffoundry.formats.canonical import atomic_write
from diffoundry.reporting.gathering import as_document, gather
from diffoundry.reporting.page import write_page

DEFAULT_FILE = Path("report.html")


def run_report(bundle: Path, out: Path | None, as_json: bool) -> ExitCode:
    """Write the page; with `as_json` print its data, and write the page only where `out` says.

    Exit 0 whatever the verdict: the page was written. `verify` is what judges. Raises
    DiffoundryError.
    """
    target = out or (None if as_json else DEFAULT_FILE)
    if target is not None:
        _check_target(target, bundle)
    progress = console(stderr=True)
    report = gather(
        bundle,
        HashCache(default_root() / "digests.sqlite"),
        say=lambda line: None if as_json else progress.print(line, style="dim", markup=False),
    )
    if target is not None:
        with disk.explained(f"--out {target}", target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, write_page(report))
    if as_json:
        print_json(as_document(report))
        return ExitCode.DONE
    notes = console()
    verdict = report.verdict
    notes.print(f"{verdict.title}: {verdict.sentence}", highlight=False, markup=False)
    for name, why in report.pictures.absent.items():
        notes.print(f"no pictures of {name}: {why}", highlight=False, markup=False)
    notes.print(f"written: {target}", highlight=False, markup=False)
    return ExitCode.DONE


def _check_target(target: Path, bundle: Path) -> None:
    """A page inside the bundle would be a file that its manifest does not list."""
    inside = target.resolve().is_relative_to(bundle.resolve())
    if inside or target.is_dir():
        raise UsageError(
            "--out",
            expected="a file outside the bundle, which would no longer verify",
            found=f"{target}, a folder" if target.is_dir() else str(target),
            remedy="choose another place, for example --out report.html",
        )
