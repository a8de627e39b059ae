"""The exported_program format: a digest of what the program is, and damage that is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.errors import ArtifactError
from diffoundry.formats import exported_program, onnx
from diffoundry.formats.safetensors_file import write_stream
from diffoundry.memory import peak_memory, reset_peak_memory
from tests.compilers import small_network as small


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_program(tmp_path_factory.mktemp("program")).path


def _copy(saved: Path, folder: Path) -> Path:
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_program_saved_last_is_not_read_again(tmp_path: Path) -> None:
    program = trace(small.small_network(), small.CONTRACT)
    exported_program.save(program, tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("published"))
    assert exported_program.load(moved) is program
    exported_program.forget()
    assert exported_program.load(moved) is not program


def test_a_program_read_from_its_file_computes_the_same(saved: Path) -> None:
    exported_program.forget()
    feeds = small.feeds_at(batch=2, height=24, width=8)
    found = exported_program.load(saved).module()(*map(torch.from_numpy, feeds.values()))
    expected = small.reference(small.small_network(), feeds)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_weights_are_mapped_and_stand_in_no_other_file(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Linear(4096, 4096)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return self.inner(value)

    weights = 4 * 4096 * 4097
    program = torch.export.export(Wide().eval().requires_grad_(False), (torch.zeros(1, 4096),))
    reset_peak_memory()
    before = peak_memory()
    exported_program.save(program, tmp_path)
    assert peak_memory() - before < weights / 2
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.pop(exported_program.WEIGHTS_FILE) >= weights
    assert sum(sizes.values()) < weights / 10
    exported_program.forget()
    found = exported_program.load(tmp_path)
    assert list(found.state_dict) == list(program.state_dict)
    for name, value in program.state_dict.items():
        assert torch.equal(found.state_dict[name], value)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or exported_program.WEIGHTS_FILE in maps.read_text()


def test_weights_of_another_program_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = _copy(saved, tmp_path)
    write_stream(folder / exported_program.WEIGHTS_FILE, {"other": np.zeros(3, np.float32)})
    exported_program.forget()
    with pytest.raises(ArtifactError, match="weights"):
        exported_program.load(folder)


def test_the_same_onnx_comes_from_memory_and_from_the_file(saved: Path, tmp_path: Path) -> None:
    program = small.make_program(tmp_path / "memory")
    first = small.make_onnx(tmp_path / "a", program, small.OnnxFromExportedProgram())
    exported_program.forget()
    second = small.make_onnx(tmp_path / "b", program, small.OnnxFromExportedProgram())
    assert onnx.digest(first.path) == onnx.digest(second.path)


def test_the_digest_sees_another_weight_and_another_graph(tmp_path: Path, saved: Path) -> None:
    changed = small.small_network()
    with torch.no_grad():
        changed.conv_in.bias[0] += 1e-6
    facts = exported_program.describe(trace(changed, small.CONTRACT))
    before = json.loads((saved / exported_program.FACTS_FILE).read_bytes())
    assert [n for n in before["weights"] if before["weights"][n] != facts["weights"][n]] == [
        "conv_in.bias"
    ]
    fixed = trace(small.small_network(), small.CONTRACT, dynamic=False)
    assert exported_program.describe(fixed)["graph"] != before["graph"]


def test_no_path_of_this_machine_stands_in_the_facts(saved: Path) -> None:
    assert "/" not in (saved / exported_program.FACTS_FILE).read_text().replace(
        "diffoundry.exported_program/1.0", ""
    )


@pytest.mark.parametrize(
    "name", ["program.pt2", "program.json", "program.seal", "weights.safetensors"]
)
def test_a_missing_file_is_named(saved: Path, tmp_path: Path, name: str) -> None:
    folder = _copy(saved, tmp_path)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=r"program\."):
        exported_program.validate(folder)


def test_a_changed_byte_is_noticed(saved: Path, tmp_path: Path) -> None:
    folder = _copy(saved, tmp_path)
    data = bytearray((folder / exported_program.PROGRAM_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / exported_program.PROGRAM_FILE).write_bytes(data)
    with pytest.raises(ArtifactError, match="expected"):
        exported_program.validate(folder)
    exported_program.forget()
    with pytest.raises(ArtifactError, match="what to do"):
        exported_program.load(folder)


def test_other_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / exported_program.FACTS_FILE).write_text("[1]")
    with pytest.raises(ArtifactError, match="facts"):
        exported_program.digest(tmp_path)
