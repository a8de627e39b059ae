"""The stream writer's files are what the safetensors library reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open

from diffoundry.formats.safetensors_file import read_header, write_stream


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "b": draw.standard_normal((3, 5)).astype(np.float32),
        "a.half": draw.standard_normal((2, 3, 4)).astype(np.float16),
        "c": np.arange(7, dtype=np.int64),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "turned": draw.standard_normal((4, 6)).astype(np.float32).T,
    }
    path = tmp_path / "some.safetensors"
    write_stream(path, arrays, {"format": "pt"})
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(arrays)
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)
    assert {name: one.shape for name, one in read_header(path).items()} == {
        name: array.shape for name, array in arrays.items()
    }
    again = tmp_path / "again.safetensors"
    write_stream(again, dict(reversed(arrays.items())), {"format": "pt"})
    assert again.read_bytes() == path.read_bytes()
