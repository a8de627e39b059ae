"""A model that is itself at fault: exit 2, the tensor is named, nothing is published."""

from __future__ import annotations

from safetensors.numpy import load_file, save_file

from diffoundry.errors import ExitCode
from tests.end_to_end.commands import run
from tests.mini_pipelines import make_named


def test_a_nan_weight(tmp_path):
    model = make_named(tmp_path / "lcm", "lcm")
    file = next((model / "vae").glob("*.safetensors"))
    weights = load_file(file)
    name = "decoder.conv_in.weight"
    weights[name].flat[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    code, text = run(tmp_path / "cache", "build", model, "--out", tmp_path / "out")
    assert code == ExitCode.USAGE, text
    assert name in text and "nothing passed" in text
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_broken_off_leaves_the_other_components_in_the_store(tmp_path):
    """The faulty VAE costs the variant, not the work on the text encoder and the U-Net."""
    model = make_named(tmp_path / "lcm", "lcm")
    file = next((model / "vae").glob("*.safetensors"))
    good = file.read_bytes()
    weights = load_file(file)
    weights["decoder.conv_in.weight"].flat[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    arguments = ("build", model, "--component", "text_encoder", "--component", "vae_decoder")
    code, text = run(tmp_path / "cache", *arguments)
    assert code == ExitCode.USAGE, text
    file.write_bytes(good)
    code, text = run(tmp_path / "cache", *arguments)
    assert code == ExitCode.DONE, text
    assert "cached   text_encoder · onnx_from_exported_program" in text
