"""What the compressed PyTorch component computes, as two files."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import simulation
from diffoundry.formats.simulation import Simulation


def make() -> Simulation:
    rng = np.random.default_rng(0)
    one, two, three = (rng.normal(size=(1, 4, 2)).astype(np.float32) for _ in range(3))
    return Simulation("sha256:abc", ({"out": one}, {"out": two}), ({"out": three},))


def test_it_comes_back_and_writes_the_same_bytes_twice(tmp_path):
    made = make()
    for name in ("one", "two"):
        simulation.save(made, tmp_path / name)
    assert simulation.digest(tmp_path / "one") == simulation.digest(tmp_path / "two")
    simulation.validate(tmp_path / "one")
    back = simulation.load(tmp_path / "one")
    assert back.recording_digest == "sha256:abc"
    for wanted, found in zip(made.calls + made.shape_calls, back.calls + back.shape_calls,
                             strict=True):  # fmt: skip
        np.testing.assert_array_equal(wanted["out"], found["out"])
    assert simulation.size_bytes(tmp_path / "one") > 3 * 32


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tensors.safetensors", flip_last_byte),
        ("simulation.json", lambda path: path.write_bytes(path.read_bytes()[:-5])),
        ("simulation.json", lambda path: path.write_text("{}")),
        ("simulation.json", lambda path: path.unlink()),
        ("tensors.safetensors", lambda path: path.unlink()),
        (
            "simulation.json",
            lambda path: path.write_text(path.read_text().replace("/1.0", "/9.0")),
        ),
    ],
)
def test_damage_is_noticed(tmp_path, file, damage):
    simulation.save(make(), tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ArtifactError):
        simulation.validate(tmp_path)
