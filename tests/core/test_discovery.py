"""What discovery says of stages."""

from __future__ import annotations

from diffoundry.discovery import retraces


def test_a_stage_whose_converter_traces_again_says_so() -> None:
    assert retraces("tflite_from_exported_program")
    assert not retraces("onnx_from_exported_program")
