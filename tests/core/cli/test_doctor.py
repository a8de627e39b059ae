"""doctor: what is here, what a target lacks, and an install line that can be pasted."""

from __future__ import annotations

from diffoundry.cli import doctor
from diffoundry.errors import ExitCode


def pretend(monkeypatch, *, missing=(), present=()):
    real = doctor.installed
    monkeypatch.setattr(
        doctor,
        "installed",
        lambda name: None if name in missing else ("1.0" if name in present else real(name)),
    )


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, capsys):
    pretend(monkeypatch, missing=("onnxscript",))
    assert doctor.run_doctor(as_json=False) == ExitCode.DONE
    text = capsys.readouterr().out
    assert "missing: onnxscript" in text
    assert 'pip install "diffoundry[build,onnx]"' in text


def test_targets_that_need_nothing_missing_are_ready(monkeypatch):
    pretend(monkeypatch, missing=("onnxscript",))
    targets = {target["name"]: target for target in doctor.examine()["targets"]}
    assert targets["onnx-cpu"]["missing"] == ["onnxscript"]
    monkeypatch.undo()
    targets = {target["name"]: target for target in doctor.examine()["targets"]}
    assert targets["onnx-cpu"]["missing"] == [] and targets["onnx-cpu"]["install"] is None


def test_both_onnxruntimes_at_once_are_a_problem(monkeypatch, capsys):
    pretend(monkeypatch, present=("onnxruntime", "onnxruntime-gpu"))
    assert doctor.run_doctor(as_json=False) == ExitCode.FAILED
    assert "uninstall both" in " ".join(capsys.readouterr().out.split())


def test_what_only_a_gpu_host_has_is_deferred_not_missing(monkeypatch):
    from diffoundry.runtimes import onnx_session
    from diffoundry.runtimes.tensorrt import driver

    monkeypatch.setattr(driver, "device_count", lambda: 0)
    monkeypatch.setattr(onnx_session, "_cuda_devices", lambda: 0)
    pretend(monkeypatch, missing=("tensorrt",))
    found = doctor.examine()
    runtimes = {runtime["name"]: runtime for runtime in found["runtimes"]}
    assert runtimes["tensorrt_engine"]["missing"] == []
    assert "GPU" in runtimes["tensorrt_engine"]["deferred"]
    assert runtimes["onnx_session"]["deferred"] is None
    targets = {target["name"]: target for target in found["targets"]}
    assert "GPU" in targets["tensorrt-fp16"]["deferred"]
    assert "device cuda" in targets["onnx-cuda-fp16"]["deferred"]
    assert targets["onnx-cpu"]["deferred"] is None
