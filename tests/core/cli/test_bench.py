"""`diffoundry bench` on the command line: tables, JSON, refused arguments, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffoundry.artifacts.compression import Compressed
from diffoundry.artifacts.evidence import evidence_path
from diffoundry.artifacts.gain import Gain
from diffoundry.artifacts.write_bundle import write_bundle
from diffoundry.benching.alone import Alone
from diffoundry.benching.contenders import Absent, Entry
from diffoundry.benching.request import PictureTask, Request
from diffoundry.benching.result import Result, Row, Verdict
from diffoundry.benching.timing import Spread
from diffoundry.cli.bench import lines, tables
from diffoundry.cli.console import console
from diffoundry.cli.main import main
from diffoundry.errors import ExitCode
from diffoundry.formats.canonical import tree_digest
from diffoundry.quality.lpips import ALEXNET
from diffoundry.quality.metrics import IS_REFERENCE, TITLES
from tests.artifacts.working_bundle import VARIANT, working_content
from tests.core.quality.weights import make_lpips

QUICK = ("--rounds", "1", "--batch", "1")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder / "bundle", working_content(folder / "parts"))
    return folder / "bundle"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """run(…) -> (exit code, standard output, standard error)."""
    monkeypatch.setenv("DIFFOUNDRY_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffoundry", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call


def test_the_text_shows_tables_a_verdict_and_who_was_absent(run: Any, built: Path) -> None:
    before = tree_digest(built)
    code, out, err = run(built, *QUICK)
    assert code == ExitCode.DONE
    for words in ("a whole picture", "median ms", VARIANT, "text_encoder", "pictures a second",
                  "batch 1", "energy: not exposed on this host",
                  "not measured: PyTorch: the folder of the model"):  # fmt: skip
        assert words in out
    assert f"{VARIANT}: opening" in err and "opening" not in out
    assert tree_digest(built) == before


def test_json_is_one_document_and_quality_without_a_judge_is_said(run: Any, built: Path) -> None:
    code, out, _ = run(built, *QUICK, "--quality", "--pairs", "2", "--json")
    document = json.loads(out)
    assert code == ExitCode.DONE
    assert [row["name"] for row in document["variants"]] == [VARIANT]
    assert document["settings"]["rounds"] == 1
    assert any("no recogniser" in note for note in document["notes"])
    assert any("clip_score" in note and "--clip DIR" in note for note in document["notes"])


def test_metrics_are_printed_beside_what_was_not_measured(
    run: Any, built: Path, tmp_path: Path
) -> None:
    weights = make_lpips(tmp_path / "alex.safetensors", ALEXNET)
    arguments = (*QUICK, "--quality", "--pairs", "2", "--lpips", weights)
    code, out, _ = run(built, *arguments)
    assert code == ExitCode.DONE
    assert "not measured: fid: no weights named: --fid FILE" in " ".join(out.split())
    code, out, _ = run(built, *arguments, "--json")
    found = json.loads(out)["variants"][0]["metrics"]
    assert code == ExitCode.DONE and found["lpips"] is None and found["clip_score"] is None
    assert found["not_measured"]["lpips"] == IS_REFERENCE, "no PyTorch original here"


def test_a_row_of_metrics_leaves_out_what_nobody_measured() -> None:
    one = Row(Entry("onnx", "engine", "cpu"))
    one.metrics = {**dict.fromkeys(TITLES), "lpips": 0.01234, "lpips_max": 0.5, "pairs": 9,
                   "steps": 4, "reference": "PyTorch eager"}  # fmt: skip
    task = PictureTask("a cat", 4, 3.0, "lcm", 64, 64)
    result = Result("sha256:0", Request(), task, (one,), (), "RAPL", ())
    table = tables(result)[-1]
    assert [str(column.header) for column in table.columns] == ["", "LPIPS", "worst"]
    assert [list(column.cells) for column in table.columns] == [["onnx"], ["0.0123"], ["0.5000"]]


def test_verdicts_and_what_was_made_smaller_have_tables_of_their_own() -> None:
    one = Row(Entry("int8", "engine", "cpu"))
    fast = Gain(pays=True, speed=1.8, rounds=3, seconds=0.005, baseline_seconds=0.009)
    slow = fast.model_copy(update={"pays": False, "speed": 0.8})
    one.verdict = Verdict(False, "fp32", "does not pay: 0.80 ×", slow, {"unet": fast})
    one.compression = {"unet": Compressed((2_000_000, 1_500_000), None, {"static": 84, "float": 2})}
    task = PictureTask("a cat", 4, 3.0, "lcm", 64, 64)
    result = Result("sha256:0", Request(), task, (one,), (), "RAPL", ())
    shown = {str(table.title): table for table in tables(result)}
    cells = [list(column.cells) for column in shown["does it pay?"].columns]
    assert cells == [["int8"], ["fp32"], ["DOES NOT PAY 0.80 ×"], ["pays 1.80 ×"]]
    cells = [list(column.cells) for column in shown["made smaller: before → after"].columns]
    assert cells == [["int8"], ["unet"], ["2 → 1.5 M"], [""], ["84 static, 2 float"]]


def test_save_writes_the_evidence_of_this_host(run: Any, built: Path) -> None:
    path = evidence_path(built)
    code, out, _ = run(built, *QUICK, "--save")
    assert code == ExitCode.DONE and "written:" in out
    saved = json.loads(path.read_text())
    assert saved["variants"][VARIANT]["bench"]["picture_seconds"]["median"] > 0
    path.unlink()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--batch", "0"), ExitCode.USAGE),
        (("--batch", "one"), ExitCode.USAGE),
        (("--rounds", "0"), ExitCode.USAGE),
        (("--pairs", "5"), ExitCode.USAGE),
        (("--lpips", "vgg.safetensors"), ExitCode.USAGE),
        (("--quality", "--fid", "nowhere.safetensors"), ExitCode.USAGE),
        (("--quality", "--clip", "nowhere"), ExitCode.USAGE),
        (("--model", "nowhere"), ExitCode.USAGE),
        (("--variant", "tflite"), ExitCode.FAILED),
    ],
)
def test_refused_arguments(run: Any, built: Path, arguments: tuple[str, ...], code: int) -> None:
    found, out, err = run(built, *QUICK, *arguments)
    assert found == code and out == "" and "Traceback" not in err


def test_no_bundle_is_a_usage_error(run: Any, tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere")[0] == ExitCode.USAGE


def test_torch_stays_out_where_no_original_is_measured(built: Path) -> None:
    code = (
        "import sys; sys.argv = ['diffoundry', 'bench', sys.argv[1], '--rounds', '1']\n"
        "from diffoundry.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(built)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_from_a_bundle_are_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    one = Row(Entry("[red]x[/red]", "engine", "cpu"), {"unet": 5}, Alone(2_000_000, 1.0))
    one.picture = one.components["[b]unet"] = one.batches[1] = Spread(0.1, 0.1, 0.2, 3)
    one.joules_per_picture = 2.5
    one.quality = {"prompt_accuracy": 0.5, "interval_95": [0.1, 0.9], "pairs": 2,
                   "abstentions": 1, "paired": None}  # fmt: skip
    task = PictureTask("a [red] cat", 4, 3.0, "lcm", 64, 64)
    result = Result("sha256:0", Request(), task, (one,), (Absent("[y]", "why"),), "RAPL", ())
    for table in tables(result):
        console().print(table)
    out = capsys.readouterr().out
    assert out.count("[red]x[/red]") == 4 and "2.50" in out and "50.0%" in out
    assert "not measured: [y]: why" in lines(result)
