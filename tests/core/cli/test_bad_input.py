"""Bad input gets one clear error with the right exit code, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffoundry.cli.main import main
from diffoundry.errors import ExitCode
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_named(tmp_path_factory.mktemp("model") / "lcm", "lcm")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("build", …) -> (exit code, what was printed)."""
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diffoundry", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.err + printed.out

    return call


def assert_one_clear_error(text: str) -> None:
    assert text.count("error:") == 1 and "Traceback" not in text
    assert "expected:" in text and "found:" in text and "what to do:" in text


def test_a_model_that_is_not_there(run, tmp_path):
    code, text = run("build", tmp_path / "nothing", "--out", tmp_path / "out")
    assert code == ExitCode.USAGE
    assert_one_clear_error(text)
    assert not (tmp_path / "out").exists()


def test_two_profiles_of_which_one_would_be_forgotten(run, model, tmp_path):
    profiles = ("--profile", "onnx-cpu", "-p", "openvino-cpu")
    code, text = run("build", model, *profiles, "--out", tmp_path / "out")
    assert code == ExitCode.USAGE and 'include = ["onnx-cpu", "openvino-cpu"]' in text
    assert_one_clear_error(text)


def test_a_folder_that_is_no_pipeline(run, tmp_path):
    (tmp_path / "model").mkdir()
    code, text = run("build", tmp_path / "model", "--out", tmp_path / "out")
    assert code == ExitCode.USAGE and "model_index.json" in text
    assert_one_clear_error(text)


def test_an_unsupported_pipeline_class_is_named_with_the_supported_ones(run, tmp_path):
    (tmp_path / "model").mkdir()
    index = {"_class_name": "FluxPipeline"}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    code, text = run("build", tmp_path / "model")
    assert code == ExitCode.USAGE
    assert "FluxPipeline" in text and "LatentConsistencyModelPipeline" in text


def test_an_unknown_component_is_refused_with_a_suggestion(run, model):
    code, text = run("build", model, "--component", "unett")
    assert code == ExitCode.USAGE and "did you mean 'unet'" in text
    assert_one_clear_error(text)


def test_an_axis_the_model_cannot_take(run, model, tmp_path):
    profile = Path(__file__).parents[3] / "profiles" / "onnx-cpu.toml"
    native, pixels = 'unit = "native"\nmin = 0.5\nopt = 1', 'unit = "pixels"\nmin = 8\nopt = 17'
    text = profile.read_text().replace(f"{native}\nmax = 2", f"{pixels}\nmax = 32", 1)
    (tmp_path / "odd.toml").write_text(text)
    code, text = run("build", model, "--profile", tmp_path / "odd.toml")
    assert code == ExitCode.USAGE and "17" in text and "16 and 20" in text
    assert_one_clear_error(text)


def test_a_profile_with_several_mistakes_names_them_all(run, model, tmp_path):
    (tmp_path / "bad.toml").write_text('schema = "diffoundry.profile/1.0"\nnam = "x"\n')
    code, text = run("build", model, "--profile", tmp_path / "bad.toml")
    assert code == ExitCode.USAGE
    assert "nam" in text and "variants" in text and "is missing" in text


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_an_output_folder_that_is_no_folder(run, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, text = run("build", model, "--out", tmp_path / "file")
    assert code == ExitCode.USAGE
    assert_one_clear_error(text)
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_folder_with_other_things_in_it_is_left_alone(run, model, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    code, text = run("build", model, "--out", tmp_path / "precious")
    assert code == ExitCode.USAGE
    assert_one_clear_error(text)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_preview_decoder_that_is_none(run, model, tmp_path):
    for folder, found in (("nothing", "no such folder"), (model, "AutoencoderKL")):
        where = ("--out", tmp_path / "out", "--preview-vae", tmp_path / folder)
        code, text = run("build", model, *where)
        assert code == ExitCode.USAGE and f"found: {found}" in text
        assert_one_clear_error(text)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache" / "entries").exists()


def test_an_unknown_option_is_a_usage_error(run):
    code, text = run("build", "--no-such-option")
    assert code == ExitCode.USAGE and "--no-such-option" in text


def test_errors_are_json_where_json_is_asked_for(run, tmp_path):
    code, text = run("build", tmp_path / "nothing", "--json")
    error = json.loads(text)["error"]
    assert code == error["exit_code"] == ExitCode.USAGE
    assert error["where"] and error["what_to_do"]


@pytest.mark.parametrize("command", ["verify", "generate"])
def test_a_bundle_that_is_not_there(run, tmp_path, command):
    more = ["a red circle"] if command == "generate" else []
    code, text = run(command, tmp_path / "nothing", *more)
    assert code == ExitCode.USAGE
    assert_one_clear_error(text)


def test_a_dry_run_lists_every_stage_and_writes_no_bundle(run, model, tmp_path):
    code, text = run("build", model, "--out", tmp_path / "out", "--dry-run", "--json")
    rows = json.loads(text)
    assert code == ExitCode.DONE and not (tmp_path / "out").exists()
    assert {row["stage"] for row in rows} >= {
        "capture",
        "exported_program_from_torch",
        "onnx_from_exported_program",
        "check_component",
        "check_pipeline",
    }
    assert all(row["key"].startswith("sha256:") and row["status"] == "miss" for row in rows)
    assert all(row["expected_peak_bytes"] > 100 << 20 for row in rows)


def test_a_budget_that_is_too_small_is_refused_before_anything_starts(run, model, tmp_path):
    code, text = run("build", model, "--out", tmp_path / "out", "--memory-budget", "100MiB")
    assert code == ExitCode.USAGE and not (tmp_path / "out").exists()
    assert_one_clear_error(text)
    assert "unet · exported_program_from_torch about" in text and "would do" in text


def test_a_budget_that_is_no_size_is_a_usage_error(run, model):
    code, text = run("build", model, "--memory-budget", "much")
    assert code == ExitCode.USAGE and "8GiB" in text


def test_profiles_and_doctor_answer_in_json(run):
    code, text = run("profiles", "--json")
    assert code == ExitCode.DONE
    assert {"onnx-cpu", "onnx-cpu-fp16"} <= {p["name"] for p in json.loads(text)}
    code, text = run("doctor", "--json")
    found = json.loads(text)
    assert {row["name"] for row in found["runtimes"]} >= {"onnx_session", "torch_eager"}
    assert all(row["install"] is None or "pip install" in row["install"] for row in found["stages"])
