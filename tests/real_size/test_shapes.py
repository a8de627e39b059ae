"""At the real size: one dynamic engine a runtime, at shapes that it was never traced at.

    .venv/bin/python -m pytest -m slow tests/real_size

Takes about a quarter of an hour and 16 GB: the model (made once, in build/models) has Stable
Diffusion 1.5's 859.6 M U-Net and 83.7 M autoencoder, whose weights are drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffoundry.memory import free_memory

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NEEDED_BYTES = 16 * 10**9
# 512 × 512, batch 1, is what was traced (with neighbours of it where axes may not agree).
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "unet": [(1, 256, 256), (4, 256, 320), (2, 512, 384), (1, 1024, 1024)],
    "vae_decoder": [(1, 256, 256), (4, 256, 320), (1, 768, 1024)],
}
PEAK_FACTOR = 1e-4
"""Largest difference allowed, as a share of the original's largest value."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(free_memory() < NEEDED_BYTES, reason="needs 16 GB of free memory (Linux)"),
]


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    """benchmarks/real_engines.py, which is no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import real_engines

        yield real_engines
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model(real: Any) -> Path:
    from make_sd15_lcm import ROOT, make

    return make(ROOT / "sd15-lcm")


@pytest.fixture(scope="module")
def engines(model: Path) -> Path:
    """Where engines are made and kept."""
    folder = model.parents[1] / "real-size"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", params=list(SHAPES))
def originals(request: pytest.FixtureRequest, real: Any, model: Path) -> Any:
    """Component, its contract, and (shape, feeds, PyTorch's answer) for each shape."""
    component = request.param
    contract = real.contract_of(model, component)
    session = real.eager(model, contract)
    calls = []
    for values in SHAPES[component]:
        shape = dict(zip(("batch", "height", "width"), values, strict=True))
        feeds = real.feeds_for(contract, shape)
        calls.append((shape, feeds, session.infer(feeds)))
    session.close()
    return component, contract, calls


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_one_engine_computes_what_pytorch_does_at_every_shape(
    real: Any, model: Path, engines: Path, originals: Any, kind: str
) -> None:
    component, contract, calls = originals
    engine = real.make(model, component, engines, ("onnx", "openvino"))[kind]
    session = real.open_engine(engine, contract)
    off = {}
    for shape, feeds, expected in calls:
        for name, value in session.infer(feeds).items():
            peak = np.abs(expected[name]).max()
            assert np.isfinite(value).all() and peak > 0.1
            at = ", ".join(f"{axis} {size}" for axis, size in shape.items())
            off[f"{name} at {at}"] = float(np.abs(value - expected[name]).max() / peak)
    session.close()
    assert len(off) == len(calls)
    assert max(off.values()) <= PEAK_FACTOR, off
