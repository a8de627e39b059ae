"""A preview decoder from the command line on: built, checked, published, verified, used."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffoundry.artifacts.bundle import open_bundle
from diffoundry.artifacts.evidence import evidence_path, read_evidence
from diffoundry.building.driver import Driver
from diffoundry.cli import build
from diffoundry.cli.main import main
from diffoundry.errors import ExitCode
from diffoundry.models.pipeline import PREVIEW
from diffoundry.reporting.gathering import gather
from diffoundry.reporting.page import write_page
from tests.core.building.test_driver import InProcessWorker
from tests.mini_pipelines import make_pipeline, make_tiny_vae

PROFILE = """
schema = "diffoundry.profile/1.0"
name = "preview-mini"

[check]
steps = 1
recorded_trajectories = 1

[[variants]]
name = "one"
runtime = "onnx_session"
shapes = "fixed"
route = [{ stage = "exported_program_from_torch" }, { stage = "onnx_from_exported_program" }]
"""


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """run("build", …) -> (exit code, standard output), stages in this process: it has PyTorch."""
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))
    here = functools.partial(Driver, start_worker=InProcessWorker)
    monkeypatch.setattr(build, "Driver", here)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diffoundry", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), capsys.readouterr().out

    return call


def test_a_preview_decoder_from_build_to_picture(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model = make_pipeline(tmp_path / "lcm", kind="lcm", mid_block=False)
    tiny = make_tiny_vae(tmp_path / "tiny")
    out, profile = tmp_path / "bundle", tmp_path / "mini.toml"
    profile.write_text(PROFILE)
    options = ("--profile", profile, "--out", out, "--preview-vae", tiny, "--jobs", 1)
    code, text = run("build", model, *options)
    assert code == ExitCode.DONE, text
    (row,) = [line for line in text.splitlines() if line.startswith("image: preview")]
    assert "pipeline" in row and "PSNR worst" in row and row.rstrip().endswith("info")

    bundle = open_bundle(out)
    assert PREVIEW in bundle.manifest.variants[0].engines and PREVIEW in bundle.manifest.golden
    assert any(note.startswith(PREVIEW) for note in bundle.manifest.notes)
    assert "--preview" in (out / "README.md").read_text("utf-8")
    found = read_evidence(evidence_path(out)).variants["one"].results
    (told,) = [c for r in found for c in r.checks if c.name == "preview"]
    assert (told.level, told.status) == ("image", "info") and told.values["worst_psnr_db"] > 0
    assert "image: preview" in write_page(gather(out))

    code, text = run("verify", out, "--json")
    assert code == ExitCode.DONE
    document: Any = json.loads(text)
    lines = [c for v in document["variants"] for r in v["parity"] for c in r["checks"]]
    assert {c["component"] for c in lines if c["level"] == "call"} == set(bundle.manifest.contracts)
    assert [c["name"] for c in lines].count("preview") == 1

    pictures = tmp_path / "pictures"
    code, text = run("generate", out, "a red circle", "--preview", "--out", pictures)
    assert code == ExitCode.DONE and "the bundle's preview decoder" in text
    with Image.open(pictures / "a-red-circle-seed0-preview.png") as png:
        label = json.loads(png.text["parameters"])["preview"]  # type: ignore[attr-defined]
    assert label["bundle"] == bundle.digest
    assert abs(label["psnr_db"] - told.values["mean_psnr_db"]) < 0.1
