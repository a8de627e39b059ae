"""What is installed is what is in the repository: wheel, extras, pins, and the symlink tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

from tools.pin import closure
from tools.symlink_tree import wanted_links

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FOLDERS: dict[str, str] = {
    folder: package.replace(".", "/")
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
}
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
NEEDED_TO_BUILD = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def repository_files() -> list[str]:
    """Return what git tracks, or would: no caches, nothing ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is nothing to compare the wheel with")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own files alone, so that leftovers cannot slip into the wheel."""
    copy = tmp_path_factory.mktemp("source")
    for name in repository_files():
        if name.split("/")[0] in FOLDERS or name in NEEDED_TO_BUILD:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built offline with the setuptools that is installed here."""
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_exactly_the_files_of_the_root_folders(wheel: Path) -> None:
    expected = set()
    for name in repository_files():
        folder, _, rest = name.partition("/")
        if folder in FOLDERS:
            expected.add(f"{FOLDERS[folder]}/{rest}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected, (
        "a folder without __init__.py, or data that [tool.setuptools.package-data] misses?"
    )


def test_the_wheels_packages_are_the_folders_with_an_init(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modules = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".py")]
    packages = {module.parent for module in modules if module.name == "__init__.py"}
    assert {module.parent for module in modules} == packages
    assert {PurePosixPath(package) for package in FOLDERS.values()} <= packages


def test_the_wheel_names_every_extra_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        (entries,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        headers = Parser().parsestr(archive.read(metadata).decode())
        commands = archive.read(entries).decode()
    assert set(headers.get_all("Provides-Extra") or []) == set(EXTRAS)
    assert "diffoundry = diffoundry.cli.main:main" in commands


def test_the_base_and_the_extras_keep_their_promises() -> None:
    def names(lines: list[str]) -> set[str]:
        return {line.partition(">")[0].partition("[")[0] for line in lines}

    base = names(PROJECT["project"]["dependencies"])
    assert base.isdisjoint(names(EXTRAS["build"]) | names(EXTRAS["onnx"]))
    assert names(EXTRAS["onnx"]) ^ names(EXTRAS["onnx-gpu"]) == {"onnxruntime", "onnxruntime-gpu"}
    assert "onnx-gpu" not in "".join(EXTRAS["all"])
    targets = set(EXTRAS) - {"all", "dev", "onnx-gpu"}
    assert EXTRAS["all"] == [f"diffoundry[{','.join(sorted(targets))}]"]


def pins() -> dict[str, str]:
    """Return name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines)


def test_constraints_are_plain_sorted_pins() -> None:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    assert text == "".join(f"{name}=={version}\n" for name, version in sorted(pins().items()))
    assert not {"/", "+", ":", "@", " "} & set(text)


@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11),
    reason="the pins' closure depends on the platform; it is compared on Linux, Python 3.11",
)
def test_constraints_pin_all_that_all_and_dev_bring_and_nothing_else() -> None:
    assert set(pins()) == set(closure(frozenset({"all", "dev"})))


def test_the_symlink_tree_shows_every_module_once(tmp_path: Path) -> None:
    script = ROOT / "tools" / "symlink_tree.py"
    leftover = tmp_path / "diffoundry" / "gone.py"
    leftover.parent.mkdir()
    leftover.symlink_to("nowhere")
    for _ in range(2):
        subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    shown = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.glob("*/*")}
    assert shown.keys() == wanted_links().keys()
    assert not leftover.is_symlink()
    for name, target in wanted_links().items():
        assert not os.path.isabs(os.readlink(tmp_path / name))
        assert (tmp_path / name).resolve() == target.resolve()
