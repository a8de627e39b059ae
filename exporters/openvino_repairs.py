"""What is put right in a model before it is saved as OpenVINO IR, which would compute it wrong."""

from __future__ import annotations

from typing import Any

from diffoundry.formats import openvino

NO_BIAS = 1e-30
"""Far below what float32 can tell apart from zero beside any value of a network."""

_KEEP = "precise_0"
"""OpenVINO's name of the mark on an operation whose precision may not be lowered."""
_ANGLES = ("Cos", "Sin")


def give_biases(model: Any) -> None:
    """A bias that changes no sum, for every convolution that has none.

    Where sizes are dynamic, OpenVINO 2026.4 computes an INT8 convolution without a bias wrong on a
    CPU (4 dB SQNR from what onnxruntime makes of the same file; the decoder of an AutoencoderTiny,
    which has such layers, 13 dB). A bias of zero is optimised away.
    """
    operations = openvino.import_openvino().opset13
    for layer in model.get_ordered_ops():
        if layer.get_type_name() != "Convolution":
            continue
        readers = list(layer.output(0).get_target_inputs())
        if not any(_adds_a_constant(reader.get_node()) for reader in readers):
            none = operations.constant(NO_BIAS, layer.get_element_type())
            biased = operations.add(layer.output(0), none)
            biased.set_friendly_name(f"{layer.get_friendly_name()}/no_bias")
            for reader in readers:
                reader.replace_source_output(biased.output(0))


def _adds_a_constant(operation: Any) -> bool:
    inputs = [value.get_node().get_type_name() for value in operation.input_values()]
    return operation.get_type_name() == "Add" and "Constant" in inputs


def keep_angles(model: Any) -> None:
    """Keep sines and cosines, and all that they are taken of, in float32.

    A denoiser takes them of its timestep. In bfloat16 999 is 1000, and with frequencies stored in
    fp16 the angle is off by 0.04 of a radian and more.
    """
    waiting = [layer for layer in model.get_ordered_ops() if layer.get_type_name() in _ANGLES]
    kept: set[str] = set()
    while waiting:
        layer = waiting.pop()
        name, kind = layer.get_friendly_name(), layer.get_type_name()
        if name in kept or kind == "Parameter":
            continue
        if kind == "Constant":
            _split(layer)
        elif kind == "Unsqueeze" and (reshape := _as_reshape(layer)) is not None:
            waiting.append(reshape)
        else:
            kept.add(name)
            layer.get_rt_info()[_KEEP] = True
            waiting += [value.get_node() for value in layer.input_values()]


def _as_reshape(unsqueeze: Any) -> Any | None:
    """The same as a Reshape, put in its place; None where new sizes do not all stand at the end.

    OpenVINO's CPU makes a Reshape of it anyway, and loses the mark then.
    """
    source, axes = unsqueeze.input_value(0), unsqueeze.input_value(1).get_node()
    rank = source.get_partial_shape().rank
    if axes.get_type_name() != "Constant" or rank.is_dynamic:
        return None
    old, new = rank.get_length(), len(axes.data.reshape(-1))
    if {int(axis) % (old + new) for axis in axes.data.reshape(-1)} != set(range(old, old + new)):
        return None
    operations = openvino.import_openvino().opset13
    made = operations.reshape(source, [0] * old + [1] * new, special_zero=True)
    made.set_friendly_name(unsqueeze.get_friendly_name())
    for reader in list(unsqueeze.output(0).get_target_inputs()):
        reader.replace_source_output(made.output(0))
    return made


def _split(constant: Any) -> None:
    """Write a float32 constant as a sum of two that fp16 holds, since saving rounds every one."""
    import numpy as np

    values = constant.data
    if values.dtype != np.float32 or np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        return
    high = values.astype(np.float16).astype(np.float32)
    if np.array_equal(high, values):
        return
    operations = openvino.import_openvino().opset13
    readers = list(constant.output(0).get_target_inputs())
    parts = [operations.constant(part) for part in (high, values - high)]
    for part, name in zip(parts, ("high", "low"), strict=True):
        part.set_friendly_name(f"{constant.get_friendly_name()}/{name}")
    total = operations.add(*parts)
    total.set_friendly_name(f"{constant.get_friendly_name()}/exact")
    for reader in readers:
        reader.replace_source_output(total.output(0))
