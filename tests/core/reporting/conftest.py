"""One bundle whose engines run, checked on this host, with a prompt that means harm."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from diffoundry.artifacts.evidence import read_evidence
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.embedded.scenes import Scene, caption, draw
from diffoundry.formats.recording import Trajectory
from diffoundry.reporting.attributes import score_attributes
from diffoundry.reporting.gathering import Report, gather
from diffoundry.reporting.pictures import EnginePicture, Pair, Pictures
from diffoundry.verifying import verify
from tests.artifacts import working_bundle

HOSTILE = '</style><script>alert("1")</script><img src=x onerror=alert(2)> & \'a "fox"'
SCENES = (
    Scene("red", "circle", "large", "white"),
    Scene("blue", "star", "small", "yellow"),
)
BENCH = {
    "name": "onnx-cpu-fp32",
    "picture_seconds": {"median": 0.02, "p10": 0.019, "p90": 0.024, "rounds": 3},
    "against_pytorch_eager": 2.5,
    "components": {"unet": {"seconds": {"median": 0.004, "p10": 0.003, "p90": 0.005}}},
    "throughput": {
        "1": {"pictures_per_second": 50.0},
        "2": {"pictures_per_second": 81.0},
        "4": {"pictures_per_second": "not a number"},
    },
    "peak_memory_bytes": 210_000_000,
    "joules_per_picture": None,
    "prompt_accuracy": 0.96,
    "metrics": {
        "clip_score": 27.125,
        "clip_score_change": -0.25,
        "lpips": 0.0123,
        "lpips_max": None,
        "fid": "not a number",
        "pairs": 500,
        "steps": 4,
        "reference": "<PyTorch> eager",
    },
    "settings": {"rounds": 3, "threads": 2, "steps": 4},
    "verdict": {"pays": True, "text": "pays: 2.50 × the speed of <PyTorch>"},
}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(working_bundle, "PROMPT", HOSTILE)
        write_bundle(folder / "bundle", working_bundle.working_content(folder / "parts"))
    verify(folder / "bundle", complete=True)
    (path,) = (folder / "bundle" / "evidence").glob("*.json")
    evidence = read_evidence(path)
    variants = {
        name: one.model_copy(update={"bench": BENCH}) for name, one in evidence.variants.items()
    }
    path.write_text(evidence.model_copy(update={"variants": variants}).to_json(), "utf-8")
    return folder / "bundle"


@pytest.fixture(scope="session")
def report(bundle: Path) -> Report:
    """The bundle's own report, with two pairs more as the embedded model would draw them."""
    found = gather(bundle)
    pictures = Pictures((*found.pictures.pairs, *scene_pairs()), {"onnx-gpu": "needs a <GPU>"})
    return dataclasses.replace(found, pictures=pictures, scores=score_attributes(pictures))


def scene_pairs() -> tuple[Pair, ...]:
    """Both references are right; the engine draws the first right, the second unreadable."""
    recorded = trajectory()
    pairs = []
    for number, scene in enumerate(SCENES):
        reference = draw(scene, np.random.default_rng(number)).astype(np.float32) / 255
        image = reference if number == 0 else np.full_like(reference, 0.5)
        engine = EnginePicture("onnx-cpu-fp32", image, 300.0 if number == 0 else 9.0, 0.5, 0.5)
        one = dataclasses.replace(recorded, prompt=caption(scene))
        pairs.append(Pair(one, reference, (engine,)))
    return tuple(pairs)


def trajectory() -> Trajectory:
    empty = np.zeros((1, 3, 2, 2), np.float32)
    image = np.zeros((1, 8, 8, 3), np.float32)
    return Trajectory("", "", 7, "ddim", 2, 3.0, {}, empty, None, empty, image)
