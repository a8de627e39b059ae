"""The store: hits, damage, two builders at once, kill -9, full and closed disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from diffoundry.artifacts import disk, hash_cache, store as store_module
from diffoundry.artifacts.hash_cache import HashCache
from diffoundry.artifacts.store import NewOutput, Record, Store
from diffoundry.errors import ArtifactError, StageError, UsageError
from diffoundry.formats.canonical import sha256_bytes, tree_digest
from diffoundry.types import ArtifactType, Axis, AxisRef, Contract, TensorSpec

KEY = sha256_bytes(b"key")
TYPE = ArtifactType("onnx", "fp32")
CONTRACT = Contract(
    "unet",
    (TensorSpec("sample", "float32", (AxisRef("batch"), 3, AxisRef("height", 8))),),
    (TensorSpec("model_output", "float32", (AxisRef("batch"), 3)),),
    (Axis("batch", 1, 1, 4), Axis("height", 8, 16, 32, 8)),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, key: str = KEY, text: str = "engine") -> store_module.Entry:
    with store.work_folder(key) as work:
        folder = work / "made"
        folder.mkdir()
        (folder / "model.onnx").write_text(text)
        outputs = {"engine": NewOutput(folder, TYPE, CONTRACT)}
        return store.publish(key, outputs, Record("make_engine", "unet", 1.5, 1000, {"x": "1"}))


def leftovers(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "work").iterdir())


def test_a_published_entry_is_found_again_with_everything_it_was_given(store: Store) -> None:
    assert store.lookup(KEY) is None
    made = publish(store)
    found = Store(store.root).lookup(KEY)
    assert found == made
    assert found is not None
    engine = found.outputs["engine"]
    assert engine.type == TYPE and engine.contract == CONTRACT
    assert engine.digest == tree_digest(engine.path)
    assert engine.size_bytes == len("engine")
    assert (found.stage, found.component, found.seconds) == ("make_engine", "unet", 1.5)
    assert found.peak_memory_bytes == 1000 and found.tools == {"x": "1"}
    assert leftovers(store) == []


@pytest.mark.parametrize("damage", ["flip", "same mtime", "missing", "extra", "record", "json"])
def test_a_damaged_entry_is_reported_removed_and_can_be_made_again(
    tmp_path: Path, damage: str
) -> None:
    lines: list[str] = []
    store = Store(tmp_path, lines.append)
    file = publish(store).outputs["engine"].path / "model.onnx"
    assert store.lookup(KEY) is not None
    before = file.stat()
    record = file.parents[1] / "entry.json"
    if damage == "missing":
        file.unlink()
    elif damage == "extra":
        (file.parent / "more").write_text("x")
    elif damage == "record":
        record.write_text(record.read_text().replace("make_engine", "make_motor"))
    elif damage == "json":
        record.write_text("{")
    else:
        file.write_text("motors")
        if damage == "same mtime":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.lookup(KEY) is None
    assert len(lines) == 1 and "damaged" in lines[0] and file.parents[1].name in lines[0]
    assert not file.parents[1].exists()
    publish(store)
    assert store.lookup(KEY) is not None


def test_unchanged_files_are_hashed_once_and_all_again_on_demand(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(store).outputs["engine"].path / "model.onnx"
    old = file.stat().st_mtime_ns
    monkeypatch.setattr("diffoundry.artifacts.hash_cache.FRESH_NS", -1)
    store.lookup(KEY)
    hashed: list[Path] = []
    monkeypatch.setattr(
        "diffoundry.artifacts.hash_cache.sha256_file",
        lambda path: hashed.append(path) or sha256_bytes(path.read_bytes()),
    )
    assert store.lookup(KEY) is not None
    assert hashed == [] and file.stat().st_mtime_ns == old
    assert store.lookup(KEY, rehash=True) is not None
    assert hashed == [file]


def test_a_file_written_a_moment_ago_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HashCache(tmp_path / "cache.sqlite")
    file = tmp_path / "file"

    def digests(newest_ns: int) -> list[str]:
        # Two writes within one tick of the clock: the same identity for other contents.
        monkeypatch.setattr(hash_cache, "_identity", lambda path: (f"{newest_ns}", newest_ns))
        found = []
        for text in ("one", "two"):
            file.write_text(text)
            found.append(cache.file_digest(file))
        return found

    one, two = sha256_bytes(b"one"), sha256_bytes(b"two")
    assert digests(time.time_ns() + 10**12) == [one, two]
    assert digests(1) == [one, one]


def test_a_file_whose_mtime_was_put_back_has_another_identity(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.utime(tmp_path / "file", ns=(1, 1))
    stat = (tmp_path / "file").stat()
    identity, newest = hash_cache._identity(tmp_path / "file")
    assert str(stat.st_ctime_ns) in identity.split(":")
    assert newest == stat.st_ctime_ns != stat.st_mtime_ns


def test_a_broken_hash_cache_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "cache.sqlite").write_bytes(b"not a database" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    cache = HashCache(tmp_path / "cache.sqlite")
    assert cache.tree_digest(tmp_path / "folder") == tree_digest(tmp_path / "folder")


def test_digests_of_a_model_folder_are_remembered_until_a_file_changes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffoundry.artifacts.hash_cache.FRESH_NS", -1)
    blobs, model = tmp_path / "blobs", tmp_path / "model"
    blobs.mkdir()
    model.mkdir()
    (blobs / "1").write_text("weights")
    (model / "weights").symlink_to(blobs / "1")  # as the hub's cache does
    calls: list[Path] = []

    def digest(path: Path) -> str:
        calls.append(path)
        return sha256_bytes((path / "weights").read_bytes())

    first = store.digest_of(model, digest)
    assert store.digest_of(model, digest) == first and len(calls) == 1
    (blobs / "1").write_text("weights!")
    assert store.digest_of(model, digest) != first and len(calls) == 2


def test_an_output_that_was_not_written_is_an_error_and_nothing_is_published(
    store: Store, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="did not write"):
        store.publish(KEY, {"engine": NewOutput(tmp_path / "none", TYPE)}, Record("make"))
    assert store.lookup(KEY) is None and leftovers(store) == []


def test_an_output_that_holds_a_link_is_refused(store: Store) -> None:
    with pytest.raises(ArtifactError, match="link"), store.work_folder(KEY) as work:
        (work / "made").mkdir()
        (work / "made" / "link").symlink_to("/etc/hostname")
        store.publish(KEY, {"engine": NewOutput(work / "made", TYPE)}, Record("make"))
    assert store.lookup(KEY) is None and leftovers(store) == []


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StageError, "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), UsageError, "DIFFOUNDRY_CACHE"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("moment", ["place", "record", "rename"])
def test_a_disk_that_fails_or_ctrl_c_while_publishing_leaves_nothing_behind(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: type,
    says: str | None,
    moment: str,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    target = {"place": (disk, "place"), "record": (Path, "write_text"), "rename": (os, "rename")}
    with store.work_folder(KEY) as work:
        (work / "made").write_text("engine")
        outputs = {"engine": NewOutput(work / "made", TYPE)}
        monkeypatch.setattr(*target[moment], fail)
        with pytest.raises(kind, match=says):
            store.publish(KEY, outputs, Record("make"))
        monkeypatch.undo()
    assert store.lookup(KEY) is None
    assert leftovers(store) == []
    publish(store)
    assert store.lookup(KEY) is not None


def test_a_store_that_cannot_be_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="DIFFOUNDRY_CACHE"):
            Store(root)


def test_the_store_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "here"))
    assert Store().root == tmp_path / "here"
    monkeypatch.delenv("DIFFOUNDRY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store_module.default_root().name == "diffoundry"
    if sys.platform == "linux":
        assert store_module.default_root() == tmp_path / "xdg" / "diffoundry"


SCRIPT = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from diffoundry.artifacts import store as module
    from diffoundry.artifacts.store import NewOutput, Record, Store
    from diffoundry.types import ArtifactType
    root, key, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    store = Store(root, lambda line: print(line, flush=True))
    def make(mode):
        with store.work_folder(key) as work:
            (work / "made").mkdir()
            (work / "made" / "model.onnx").write_text("engine")
            print("made", flush=True)
            if mode == "die":
                sys.stdin.readline()
            if mode == "die publishing":
                def wait(*args):
                    print("publishing", flush=True)
                    sys.stdin.readline()
                os.rename = wait
            store.publish(
                key, {"engine": NewOutput(work / "made", ArtifactType("onnx"))}, Record("make")
            )
    with store.lock(key):
        if mode == "hold":
            print("held", flush=True)
            sys.stdin.readline()
        if store.lookup(key):
            print("hit", flush=True)
        else:
            make(mode)
    """
)


def start(store: Store, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store.root), KEY, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_two_builds_at_once_one_makes_the_entry_and_the_other_waits_and_finds_it(
    store: Store,
) -> None:
    first = start(store, "hold")
    assert read(first) == "held"
    second = start(store, "make")
    assert "another build" in read(second)
    assert first.communicate("\n", timeout=60)[0].split() == ["made"]
    assert second.communicate(timeout=60)[0].split() == ["hit"]
    assert store.lookup(KEY) is not None


def test_two_publishers_of_one_key_without_the_lock_leave_one_good_entry(store: Store) -> None:
    first = publish(store)
    again = publish(store, text="engine")
    assert again == first and leftovers(store) == []


@pytest.mark.parametrize("mode", ["die", "die publishing"])
def test_kill_9_leaves_nothing_half_published_and_the_next_build_cleans_up(
    tmp_path: Path, mode: str
) -> None:
    lines: list[str] = []
    store = Store(tmp_path, lines.append)
    process = start(store, mode)
    assert read(process) == "made"
    if mode == "die publishing":
        assert "publishing" in read(process)
    process.kill()
    process.communicate()
    assert store.lookup(KEY) is None
    assert leftovers(store) != []
    with store.lock(KEY):  # the dead process's lock is free again
        publish(store)
    assert store.lookup(KEY) is not None
    assert leftovers(store) == []
    assert any("killed" in line for line in lines)


def test_a_living_build_keeps_its_work_folder_when_another_cleans_up(store: Store) -> None:
    with store.work_folder(KEY) as work:
        (work / "half").write_text("")
        publish(Store(store.root), sha256_bytes(b"other"))
        assert (work / "half").exists()
