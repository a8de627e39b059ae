"""Interrupted, killed, or run twice at once: a build loses nothing and leaves nothing half."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from diffoundry.errors import ExitCode
from tests.end_to_end.commands import files_of, run, run_json, start
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture(autouse=True)
def _ctrl_c_reaches_children():
    """A background job of a shell ignores SIGINT, and its children would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def read_until(process, words: str) -> str:
    """Read the command's lines up to the first that holds `words`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} never came:\n{''.join(lines)}")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "cache"]


def test_ctrl_c_then_kill_9_then_two_builds_at_once(model, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = ("build", model, "--out", out)

    process = start(cache, *arguments)
    read_until(process, "start ")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED
    assert leftovers(tmp_path) == []

    process = start(cache, *arguments)
    read_until(process, "done ")  # one stage is finished, the next ones are being made
    read_until(process, "start ")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "a killed build left workers behind"
    assert leftovers(tmp_path) == []

    first = start(cache, *arguments)
    other = tmp_path / "other"
    code, document = run_json(cache, "build", model, "--out", other)
    printed, _ = first.communicate()
    assert code == first.returncode == ExitCode.DONE, printed
    assert any(stage["status"] == "hit" for stage in document["stages"])
    assert files_of(out) == files_of(other)

    # A second build in a store of its own makes the same bytes.
    again = tmp_path / "again"
    code, printed = run(tmp_path / "cache2", "build", model, "--out", again)
    assert code == ExitCode.DONE, printed
    assert files_of(again) == files_of(out)
    for name, contents in files_of(out).items():
        assert str(tmp_path).encode() not in contents, f"{name} names the building machine"
