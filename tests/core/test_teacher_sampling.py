"""Step tables and classifier-free guidance on trained weights: the teacher of shapes-lcm."""

from __future__ import annotations

import pytest

from diffoundry.embedded.recogniser import recognise
from diffoundry.embedded.scenes import parse
from diffoundry.formats import step_table
from diffoundry.generation import TextToImage
from diffoundry.models.contracts import contract_for, native_axes
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.runtimes.torch_eager import TorchEager
from diffoundry.sampling.probing import probe_scheduler
from diffoundry.sessions import open_session
from diffoundry.types import Artifact, ArtifactType
from tests.teacher import DATA, assemble_teacher

PROMPTS = (
    "a large red circle on a white background",
    "a large blue square on a yellow background",
    "a large green triangle on a black background",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> TextToImage:
    """The teacher behind PyTorch sessions, with step tables probed from its scheduler."""
    folder = tmp_path_factory.mktemp("teacher")
    source = open_pipeline(assemble_teacher(folder / "model"))
    axes = native_axes(source, {})
    module = ArtifactType("torch_module", "fp32")
    sessions = {
        name: open_session(
            TorchEager(),
            Artifact(module, source.components[name].folder, "", name),
            contract_for(source, name, axes),
        )
        for name in ("text_encoder", "unet", "vae_decoder")
    }
    for name in ("ddim", "dpmpp_2m", "euler"):
        tables = probe_scheduler(name, source.scheduler, source.pipeline_class, name == "ddim")
        step_table.save(tables, folder)
    return TextToImage(
        sessions,
        Tokenizer.open(source.tokenizer_path),
        step_table.open_tables(folder),
        source.geometry,
    )


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 20), ("dpmpp_2m", 10), ("euler", 12)])
def test_every_scheduler_draws_what_the_prompt_says(teacher, scheduler, steps):
    pictures = teacher.generate(PROMPTS, steps=steps, guidance=3.0, scheduler=scheduler, seed=1)
    read = [recognise(picture.image) for picture in pictures]
    right = sum(seen == parse(prompt) for seen, prompt in zip(read, PROMPTS, strict=True))
    assert right >= 2, read


def test_the_teacher_is_safetensors_only_and_small():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 12e6
