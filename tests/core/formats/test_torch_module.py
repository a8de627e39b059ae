"""The torch_module kind: which files belong to it, their digest, and damage to them."""

import json
import shutil

import pytest

from diffoundry.errors import ModelError
from diffoundry.formats import torch_module
from diffoundry.formats.safetensors_file import read_header
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {name: make_named(folder / name, name) for name in ("sd", "sharded", "fp16_variant")}


@pytest.fixture
def unet(pipelines, tmp_path):
    return shutil.copytree(pipelines["sd"] / "unet", tmp_path / "unet")


@pytest.fixture
def sharded(pipelines, tmp_path):
    return shutil.copytree(pipelines["sharded"] / "unet", tmp_path / "unet")


def names(paths):
    return [path.name for path in paths]


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        torch_module.validate(folder)
    return caught.value.text()


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_finds_plain_variant_and_sharded_weights(pipelines):
    assert names(torch_module.find_weights(pipelines["sd"] / "unet")) == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert names(torch_module.find_weights(pipelines["fp16_variant"] / "text_encoder")) == [
        "model.fp16.safetensors"
    ]
    shards = torch_module.find_weights(pipelines["sharded"] / "text_encoder")
    assert names(shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_shards_of_a_variant_are_found_under_both_names(sharded):
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    expected = torch_module.find_weights(sharded)
    for name in (
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ):
        index = index.rename(sharded / name)
        assert torch_module.find_weights(sharded) == expected


def test_headers_give_every_tensor_once(pipelines):
    plain = torch_module.read_headers(pipelines["sd"] / "unet")
    assert plain == torch_module.read_headers(pipelines["sharded"] / "unet")
    assert plain["conv_in.weight"].shape == (8, 4, 3, 3)
    half = torch_module.read_headers(pipelines["fp16_variant"] / "unet")
    assert {tensor.dtype for tensor in half.values()} == {"F16"}


def test_only_the_files_that_count_are_in_the_digest(unet):
    before = torch_module.digest(unet)
    size = torch_module.size_bytes(unet)
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (unet / "README.md").write_text("x")
    assert torch_module.digest(unet) == before
    assert torch_module.size_bytes(unet) == size
    edit(unet / "config.json", sample_size=16)
    assert torch_module.digest(unet) != before


def test_surgery_counts(unet):
    before = torch_module.digest(unet)
    (unet / "surgery.json").write_text('{"schema": "diffoundry.surgery/1", "operations": []}')
    assert torch_module.digest(unet) != before
    torch_module.validate(unet)
    edit(unet / "surgery.json", operations=[{"operation": "unknown"}])
    assert "'unknown'" in refusal(unet)


def test_the_module_loads(unet):
    module = torch_module.load_model(unet, "unet")
    assert sum(parameter.numel() for parameter in module.parameters()) > 10_000


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_weights_are_refused(unet, keep):
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert path.name in refusal(unet)


def test_weights_with_bytes_too_many_are_refused(unet):
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "too long" in refusal(unet)


def write_header(path, header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"{", "not JSON"),
        ([1], "not a JSON object"),
        ({"a": {}}, "no dtype"),
        ({"a": entry(dtype="X9")}, "'X9'"),
        ({"a": entry(shape=(3,))}, "8 bytes for F32[3]"),
        ({"a": entry(shape=(-2,))}, "F32[-2]"),
        ({"a": entry(offsets=(4, 12))}, "at byte 4"),
        ({"a": entry(), "b": entry()}, "at byte 0 where 8"),
        ({"a": entry(shape=(1 << 40,), offsets=(0, 4 << 40))}, "cut off"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, named):
    path = tmp_path / "model.safetensors"
    write_header(path, header)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert named in caught.value.text()


def test_a_huge_header_length_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="header of"):
        read_header(path)


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("outside", ["../outside.safetensors", "/etc/passwd.safetensors"])
def test_a_shard_outside_the_folder_is_refused(sharded, outside):
    edit(sharded / INDEX, weight_map={"conv_in.weight": outside})
    assert "stays inside" in refusal(sharded)


def test_a_shard_through_a_link_is_refused(sharded, tmp_path):
    shard = torch_module.find_weights(sharded)[0]
    moved = shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(moved)
    assert "link" in refusal(sharded)


def test_a_shard_that_is_a_pickle_is_refused(sharded):
    edit(sharded / INDEX, weight_map={"conv_in.weight": "model.bin"})
    assert "safetensors" in refusal(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = torch_module.find_weights(sharded)[0]
    shard.unlink()
    assert shard.name in refusal(sharded)


@pytest.mark.parametrize("weight_map", [{}, None, 3])
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    edit(sharded / INDEX, weight_map=weight_map)
    assert "weight_map" in refusal(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    weight_map["invented.weight"] = weight_map["conv_in.weight"]
    edit(sharded / INDEX, weight_map=weight_map)
    assert "'invented.weight'" in refusal(sharded)


def test_a_pickle_is_refused_with_the_reason(unet):
    path = unet / "diffusion_pytorch_model.safetensors"
    path.rename(unet / "diffusion_pytorch_model.bin")
    text = refusal(unet)
    assert "can run code" in text
    assert "safe_serialization" in text
