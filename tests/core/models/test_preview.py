"""A preview decoder beside a pipeline: taken from a folder, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from diffoundry.errors import ExitCode, ModelError
from diffoundry.models.components import load_component
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import PREVIEW, PipelineSource, open_pipeline
from diffoundry.models.preview import with_preview_decoder
from tests.mini_pipelines import make_named, make_pipeline, make_tiny_vae


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PipelineSource:
    return open_pipeline(make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_vae(tmp_path / "tiny")


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(source: PipelineSource, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        with_preview_decoder(source, folder)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value.text()


@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
def test_it_decodes_what_the_unet_leaves_as_a_pipeline_would(
    source: PipelineSource, tmp_path: Path, scaling_factor: float
) -> None:
    folder = make_tiny_vae(tmp_path / "tiny", scaling_factor=scaling_factor)
    widened = with_preview_decoder(source, folder)
    assert list(widened.components) == [*source.components, PREVIEW]
    assert widened.geometry == source.geometry
    contract = contract_for(widened, PREVIEW, native_axes(widened, {}))
    decoder = contract_for(source, "vae_decoder", native_axes(source, {}))
    assert [spec.dims for spec in contract.inputs] == [spec.dims for spec in decoder.inputs]
    assert contract.axes == decoder.axes
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_component(folder, PREVIEW)(latent)
        wanted = AutoencoderTiny.from_pretrained(folder).decode(latent / scaling_factor).sample
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_pipelines_folder_lends_its_vae(source: PipelineSource, tmp_path: Path) -> None:
    lender = make_pipeline(tmp_path / "lender", vae="AutoencoderTiny", vae_widths=(4, 4))
    found = with_preview_decoder(source, lender).components[PREVIEW]
    assert found.folder == lender / "vae" and found.class_name == "AutoencoderTiny"


def test_without_one_nothing_is_known_of_it(source: PipelineSource) -> None:
    with pytest.raises(ModelError, match=PREVIEW):
        contract_for(source, PREVIEW, native_axes(source, {}))


def test_what_is_no_such_folder_is_refused(source: PipelineSource, tmp_path: Path) -> None:
    assert "no such folder" in refusal(source, tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    assert "found: a file" in refusal(source, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor model_index.json" in refusal(source, tmp_path / "empty")


def test_another_class_is_refused_by_its_name(source: PipelineSource, tiny: Path) -> None:
    assert "found: AutoencoderKL" in refusal(source, source.path)
    assert "found: AutoencoderKL" in refusal(source, source.path / "vae")
    edit(tiny, auto_map={"AutoModel": "mine.Decoder"})
    assert "code from a model is never run" in refusal(source, tiny)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"latent_channels": 3}, "3 channels, 2 pixels"),
        ({"vae_widths": (4, 4, 4)}, "4 channels, 4 pixels"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(
    source: PipelineSource, tmp_path: Path, options: dict[str, object], found: str
) -> None:
    text = refusal(source, make_tiny_vae(tmp_path / "tiny", **options))
    assert f"found: {found}" in text and "4 channels, 2 pixels a side each" in text


def test_a_shift_that_no_pipeline_here_uses_is_refused(source: PipelineSource, tiny: Path) -> None:
    edit(tiny, shift_factor=0.1)
    assert str(tiny / "config.json") in refusal(source, tiny)


def test_only_safetensors_are_read(source: PipelineSource, tiny: Path) -> None:
    weights = tiny / "diffusion_pytorch_model.safetensors"
    weights.rename(tiny / "diffusion_pytorch_model.bin")
    assert "can run code when it is read" in refusal(source, tiny)
    (tiny / "diffusion_pytorch_model.bin").unlink()
    assert "no weights" in refusal(source, tiny)
