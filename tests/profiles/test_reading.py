"""Profiles: shipped ones are valid, and a bad one reports all its mistakes at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffoundry.errors import ExitCode, ProfileError
from diffoundry.planning.planner import vocabulary
from diffoundry.profiles.reading import (
    Vocabulary,
    read_profile,
    read_prompts,
    shipped_profiles,
)

KNOWN = Vocabulary(
    stages={
        "exported_program_from_torch": {},
        "onnx_from_exported_program": {"opset": 18, "precision": "fp32"},
    },
    runtimes=("onnx_session", "torch_eager"),
    components=("text_encoder", "unet"),
)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_shipped_profile_fits_the_stages_and_runtimes_that_exist():
    known = vocabulary()
    assert {"onnx-cpu", "onnx-cpu-fp16"} <= set(shipped_profiles())
    for name in shipped_profiles():
        assert read_profile(name, known).name == name


def test_several_mistakes_are_reported_at_once_with_suggestions(tmp_path):
    path = write(
        tmp_path,
        """
        schema = "diffoundry.profile/1.0"
        name = "mine"
        descripton = "a typo"
        [limits.call]
        peak_facter = 1e-5
        [[variants]]
        name = "one"
        runtime = "onnx_sesion"
        precision = "fp23"
        route = [{ stage = "onnx_from_exported_progam" },
                 { stage = "onnx_from_exported_program", opsett = 18, precision = 16 }]
        [variants.component_routes]
        unett = [{ stage = "exported_program_from_torch" }]
        """,
    )
    with pytest.raises(ProfileError) as caught:
        read_profile(path, KNOWN)
    text = str(caught.value)
    for hint in (
        "'description'",
        "'peak_factor'",
        "'onnx_session'",
        "'onnx_from_exported_program'",
        "'opset'",
        "'unet'",
        "fp32",
        "expected str, found 16",
    ):
        assert hint in text, f"{hint} not in:\n{text}"
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unknown_profile_name_suggests_the_nearest(tmp_path):
    with pytest.raises(ProfileError, match="did you mean 'onnx-cpu'"):
        read_profile("onnx-cup", KNOWN)


def test_a_file_that_is_not_toml_says_which_line(tmp_path):
    with pytest.raises(ProfileError, match="line 2"):
        read_profile(write(tmp_path, "a = 1\nb = = 2\n"), KNOWN)


def test_an_axis_with_min_above_max_is_refused(tmp_path):
    text = shipped_profiles()["onnx-cpu"].read_text().replace("max = 4", "max = 0.5")
    with pytest.raises(ProfileError, match="min ≤ opt ≤ max"):
        read_profile(write(tmp_path, text), KNOWN)


def test_shipped_prompt_splits_are_disjoint():
    splits = read_prompts("default")
    prompts = [prompt for pairs in splits.values() for prompt, _ in pairs]
    seeds = [seed for pairs in splits.values() for _, seed in pairs]
    assert len(prompts) == len(set(prompts)) and len(seeds) == len(set(seeds))


@pytest.mark.parametrize("split", ["calibration", "tuning"])
@pytest.mark.parametrize("other", ["tuning", "evaluation"])
def test_a_prompt_file_whose_splits_overlap_is_refused(tmp_path, split, other):
    data = {"calibration": [["a", 1]], "tuning": [["b", 2]], "evaluation": [["c", 3]]}
    data[split if split != other else "calibration"].append(data[other][0])
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="disjoint"):
        read_prompts(str(path))


def test_an_included_profile_brings_its_variants_with_its_limits(tmp_path):
    path = write(
        tmp_path,
        """
        schema = "diffoundry.profile/1.0"
        name = "mine"
        include = ["onnx-cpu", "onnx-cpu-fp16"]
        [limits.image]
        psnr_db = 20
        """,
    )
    profile = read_profile(path, vocabulary())
    full, half = profile.variants
    assert (full.name, half.name) == ("onnx-cpu-fp32", "onnx-cpu-fp16")
    assert full.limits["image"].psnr_db == 50 and half.limits["image"].psnr_db == 35


def test_an_unknown_or_nested_include_is_one_of_the_mistakes(tmp_path, monkeypatch):
    outer = tmp_path / "outer.toml"
    outer.write_text('schema = "diffoundry.profile/1.0"\nname = "outer"\ninclude = ["onnx-cpu"]\n')
    shipped = {**shipped_profiles(), "outer": outer}
    monkeypatch.setattr("diffoundry.profiles.reading.shipped_profiles", lambda: shipped)
    path = write(
        tmp_path,
        """
        schema = "diffoundry.profile/1.0"
        name = "mine"
        include = ["onnx-cup", "outer"]
        """,
    )
    with pytest.raises(ProfileError) as caught:
        read_profile(path, KNOWN)
    assert "no shipped profile 'onnx-cup' (did you mean 'onnx-cpu'?)" in caught.value.found
    assert "outer includes others itself" in caught.value.found
