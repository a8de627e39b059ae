"""The fingerprint beside an engine: whole, and held against the host. The engine is any bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import tensorrt_engine
from diffoundry.formats.tensorrt_engine import Fingerprint, differences_of

HERE = Fingerprint("11.4.0.106", "NVIDIA L4", "8.9", "CUDA 13.0", "sha256:1")


def test_an_engine_reads_back_and_damage_shows(tmp_path: Path) -> None:
    tensorrt_engine.save(tmp_path, b"bytes", HERE)
    assert tensorrt_engine.load(tmp_path) == b"bytes"
    assert tensorrt_engine.read_fingerprint(tmp_path) == HERE
    tensorrt_engine.validate(tmp_path)
    assert tensorrt_engine.digest(tmp_path).startswith("sha256:")
    assert tensorrt_engine.size_bytes(tmp_path) > 5
    (tmp_path / tensorrt_engine.ENGINE_FILE).write_bytes(b"bytez")
    with pytest.raises(ArtifactError, match="sha256"):
        tensorrt_engine.validate(tmp_path)
    (tmp_path / tensorrt_engine.FINGERPRINT_FILE).write_text("{}")
    with pytest.raises(ArtifactError, match="fingerprint"):
        tensorrt_engine.read_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, []),
        ({"gpu": "NVIDIA T4"}, ["GPU"]),
        ({"compute_capability": "7.5"}, ["compute capability"]),
        ({"build_digest": "sha256:2"}, ["build"]),
        ({"tensorrt": "11.5.0.1"}, ["TensorRT"]),
        ({"driver": "CUDA 12.8"}, ["driver"]),
        ({"driver": "CUDA 13.1"}, []),
    ],
)
def test_what_differs_from_the_host_is_named(changes: dict[str, str], what: list[str]) -> None:
    other = dataclasses.replace(HERE, **changes)
    assert [name for name, _, _ in differences_of(HERE, other)] == what


@pytest.mark.parametrize(
    ("version", "runs"), [("11.5.0.1", True), ("11.3.0.1", False), ("12.0.0.1", False)]
)
def test_a_version_compatible_engine_runs_on_newer_releases_of_its_major(
    version: str, runs: bool
) -> None:
    built = dataclasses.replace(HERE, version_compatible=True)
    assert (differences_of(built, dataclasses.replace(HERE, tensorrt=version)) == []) is runs


def test_the_refusal_says_both_hosts_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        tensorrt_engine.refuse_other_host(
            tmp_path, HERE, dataclasses.replace(HERE, gpu="NVIDIA T4")
        )
    assert "GPU NVIDIA T4" in caught.value.expected and "GPU NVIDIA L4" in caught.value.found
    assert "verify BUNDLE --complete" in caught.value.remedy
