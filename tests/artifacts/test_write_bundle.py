"""Bundles as they are written: whole or not at all, and left alone when unchanged."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts import disk, swap, write_bundle as module
from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.evidence import read_evidence
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.write_bundle import check_output_folder, write_bundle
from diffoundry.errors import ArtifactError, BundleError, StageError, UsageError
from diffoundry.formats.canonical import sha256_file
from tests.artifacts.tiny_bundle import (
    contents,
    replace_content,
    tiny_content,
    tiny_measured,
    write_files,
)

pytestmark = pytest.mark.usefixtures("cache")


def neighbours(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_two_bundles_built_in_two_folders_are_byte_equal_outside_evidence(
    tmp_path: Path, out: Path
) -> None:
    other = tmp_path / "elsewhere" / "other name"
    write_bundle(other, tiny_content(tmp_path / "more parts"))
    assert contents(other) == contents(out)
    for data in contents(out).values():
        assert os.fsencode(tmp_path) not in data


def test_evidence_names_the_manifest_and_the_host(out: Path) -> None:
    (path,) = (out / "evidence").iterdir()
    evidence = read_evidence(path)
    assert evidence.manifest_digest == open_bundle(out).digest
    assert evidence.host.name == path.stem
    assert evidence.variants["onnx-cpu-fp32"].results[0].passed


def test_an_unchanged_bundle_stays_in_place_and_only_evidence_is_updated(
    tmp_path: Path, out: Path
) -> None:
    before = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    content = tiny_content(tmp_path / "parts")
    again = write_bundle(out, content, tiny_measured(), HashCache(tmp_path / "hashes"))
    assert not again.changed
    assert {path for path, inode in before.items() if path.stat().st_ino != inode} == set(
        (out / "evidence").iterdir()
    )


def test_a_changed_bundle_replaces_the_old_one_with_its_evidence(tmp_path: Path, out: Path) -> None:
    (out / "evidence" / "elsewhere.json").write_text("{}")
    assert write_bundle(out, tiny_content(tmp_path / "parts", "better engine")).changed
    assert (
        (out / "engines/onnx-cpu-fp32/vae_decoder/model.onnx").read_text().endswith("better engine")
    )
    assert open_bundle(out).verify_files() == []
    assert not (out / "evidence" / "elsewhere.json").exists()
    assert neighbours(out) == ["bundle"]


def test_a_damaged_bundle_is_repaired_and_keeps_the_evidence_of_other_hosts(
    tmp_path: Path, out: Path
) -> None:
    (out / "evidence" / "elsewhere.json").write_text("{}")
    good = contents(out)
    (out / "README.md").write_text("x")
    assert write_bundle(out, tiny_content(tmp_path / "parts")).changed
    assert contents(out) == good
    assert (out / "evidence" / "elsewhere.json").exists()


def test_a_folder_that_is_not_a_bundle_is_never_overwritten(tmp_path: Path) -> None:
    theirs = write_files(tmp_path / "thesis", {"manifest.json": '{"schema": "other/1"}'})
    for content in (theirs, write_files(tmp_path / "photos", {"1.png": ""})):
        with pytest.raises(UsageError, match=r"not part|other things"):
            write_bundle(content, tiny_content(tmp_path / "parts"))
    assert (theirs / "manifest.json").exists() and (tmp_path / "photos" / "1.png").exists()


def test_a_bundle_with_files_of_the_user_in_it_is_not_replaced(tmp_path: Path, out: Path) -> None:
    (out / "my picture.png").write_text("")
    with pytest.raises(UsageError, match=r"my picture\.png"):
        write_bundle(out, tiny_content(tmp_path / "parts", "better engine"))
    assert open_bundle(out)


def test_an_output_that_cannot_be_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "bundle", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UsageError, match="--out"):
            check_output_folder(bad)
        with pytest.raises(UsageError, match="--out"):
            write_bundle(bad, tiny_content(tmp_path / "parts"))


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_parent_folder_is_a_usage_error(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(UsageError, match="--out"):
        check_output_folder(closed / "bundle")


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), StageError, "disk is full"),
    (PermissionError(errno.EACCES, "Permission denied"), UsageError, "--out"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
]


@pytest.mark.parametrize(("error", "kind", "says"), FAILURES)
@pytest.mark.parametrize("moment", ["copy", "manifest", "evidence", "swap"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_while_publishing_leaves_the_old_bundle_and_nothing_else(
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: type[BaseException],
    says: str | None,
    moment: str,
    there: bool,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    target = out if there else tmp_path / "out" / "fresh"
    old = contents(out)
    targets: dict[str, tuple[Any, str]] = {
        "copy": (disk, "copy"),
        "manifest": (Path, "write_bytes"),
        "evidence": (module, "update_evidence"),
        "swap": (swap, "put_in_place"),
    }
    content = tiny_content(tmp_path / "new parts", "better engine")
    monkeypatch.setattr(*targets[moment], fail)
    with pytest.raises(kind, match=says):
        write_bundle(target, content)
    monkeypatch.undo()
    assert contents(out) == old
    assert neighbours(out) == ["bundle"]


def test_without_an_atomic_exchange_two_renames_put_the_bundle_in_place(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "_exchange", lambda first, second: False)
    assert write_bundle(out, tiny_content(tmp_path / "parts", "better engine")).changed
    assert neighbours(out) == ["bundle"]
    assert "better" in (out / "engines/onnx-cpu-fp32/vae_decoder/model.onnx").read_text()


def test_an_interrupt_between_two_renames_brings_the_old_bundle_back(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = contents(out)
    rename = os.rename
    seen: list[Path] = []

    def interrupted(first: Path, second: Path) -> None:
        seen.append(Path(second))
        if len(seen) == 2:
            raise KeyboardInterrupt
        rename(first, second)

    monkeypatch.setattr(swap, "_exchange", lambda first, second: False)
    content = tiny_content(tmp_path / "parts", "better engine")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(out, content)
    assert contents(out) == old and neighbours(out) == ["bundle"]


SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from diffoundry.artifacts import disk, swap, write_bundle as module
    from tests.artifacts.tiny_bundle import tiny_content
    out, parts, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    def hang(*args):
        print("now", flush=True)
        sys.stdin.readline()
    if moment == "copying":
        copied = []
        real = disk.copy
        disk.copy = lambda a, b: hang() if len(copied) > 3 else copied.append(real(a, b))
    elif moment == "before the swap":
        swap.put_in_place = hang
    else:
        swap._exchange = lambda a, b: False
        real = swap.os.rename
        calls = []
        def rename(a, b):
            calls.append(a)
            hang() if len(calls) == 2 else real(a, b)
        swap.os.rename = rename
    module.write_bundle(out, tiny_content(parts, "better engine"))
    """
)


@pytest.mark.parametrize("moment", ["copying", "before the swap", "between two renames"])
def test_kill_9_leaves_the_old_bundle_and_the_next_build_cleans_up(
    tmp_path: Path, out: Path, moment: str
) -> None:
    old = contents(out)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), str(tmp_path / "new parts"), moment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.communicate()
    assert len(neighbours(out)) > 1 or moment == "between two renames"
    if moment != "between two renames":
        assert contents(out) == old
    written = write_bundle(out, tiny_content(tmp_path / "parts"))
    assert not written.changed  # the old bundle stood, or was brought back
    assert contents(out) == old
    assert neighbours(out) == ["bundle"]


def test_a_file_that_names_the_building_machine_is_refused(tmp_path: Path) -> None:
    content = tiny_content(tmp_path / "parts")
    write_files(
        tmp_path / "parts" / "vae_decoder", {"model.onnx": f"at {tmp_path}/cache/entries/x.py"}
    )
    with pytest.raises(BundleError, match="path of the building machine"):
        write_bundle(tmp_path / "bundle", content)
    assert not (tmp_path / "bundle").exists()


def test_an_absolute_path_in_the_manifest_is_refused(tmp_path: Path) -> None:
    content = tiny_content(tmp_path / "parts", name="/home/me/model")
    with pytest.raises(BundleError, match="no absolute path"):
        write_bundle(tmp_path / "bundle", content)
    assert not (tmp_path / "bundle").exists()


def test_a_part_that_is_missing_or_holds_a_link_is_refused(tmp_path: Path) -> None:
    content = tiny_content(tmp_path / "parts")
    missing = replace_content(content, step_tables=tmp_path / "none")
    with pytest.raises(ArtifactError, match="steps of the bundle"):
        write_bundle(tmp_path / "bundle", missing)
    (tmp_path / "parts" / "steps" / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="link"):
        write_bundle(tmp_path / "bundle", content)


def test_the_output_may_be_a_link_to_a_folder_and_stays_one(tmp_path: Path, out: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    write_bundle(tmp_path / "link", tiny_content(tmp_path / "parts", "better engine"))
    assert (tmp_path / "link").is_symlink()
    assert "better" in (out / "engines/onnx-cpu-fp32/vae_decoder/model.onnx").read_text()


def test_an_engine_in_one_file_keeps_its_suffix(tmp_path: Path) -> None:
    content = tiny_content(tmp_path / "parts")
    file = tmp_path / "parts" / "decoder.tflite"
    file.write_text("engine")
    variant = content.variants[0]
    artifact = dataclasses.replace(variant.engines["vae_decoder"], path=file)
    changed = dataclasses.replace(variant, engines={**variant.engines, "vae_decoder": artifact})
    bundle = write_bundle(tmp_path / "bundle", replace_content(content, variants=(changed,))).bundle
    engine = bundle.engine(bundle.manifest.variants[0], "vae_decoder")
    assert engine.path.name == "vae_decoder.tflite" and engine.digest == sha256_file(file)
