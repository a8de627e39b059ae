"""Stores the weights of a Core ML model in fewer bits, by passes of coremltools.optimize.

They run at the end of the conversion: coremltools' functions for finished models would run all its
other passes again, also those that we leave out, and fail. Lookup tables come from a k-means of our
own: coremltools asks for scikit-learn wherever a tensor is small or in fp32.
"""

from __future__ import annotations

from typing import Any

from diffoundry.compression.palettes import palette
from diffoundry.errors import StageError

FORMS = ("float", "int8", "palette8", "palette6", "palette4")
SMALLEST = 2048
"""Values that a tensor must have to be compressed; a table would cost more than it saves."""
_SMALLEST_EXACT = 512
"""The same for weights that have few values already: with fewer than this, any may have."""
_TABLES = "compression::palettize_weights"


def add_passes(pipeline: Any, form: str, palette_bits: int, palette_group: int) -> None:
    """Let a PassPipeline store weights in `form`; or, where `palette_bits` is not 0, as a table and
    indices each that has few values (for each `palette_group` of its output channels, where that
    is not 0): then nothing is rounded, and what has more than 256 values stays."""
    if form == "float" and not palette_bits:
        return
    import coremltools.optimize.coreml as cto

    name = _TABLES
    if palette_bits:
        group: dict[str, Any] = {"group_size": palette_group, "channel_axis": 0}
        grouped = {"granularity": "per_grouped_channel", **group} if palette_group else {}
        each: Any = cto.OpPalettizerConfig(
            mode="unique", weight_threshold=_SMALLEST_EXACT, **grouped
        )
    elif form == "int8":
        name = "compression::linear_quantize_weights"
        each = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=SMALLEST)
    else:
        bits = int(form.removeprefix("palette"))
        each = cto.OpPalettizerConfig(
            mode="custom",
            lut_function=lambda values: palette(values, bits),
            weight_threshold=SMALLEST,
        )
    pipeline.append_pass(name)
    pipeline.set_options(name, {"config": cto.OptimizationConfig(global_config=each)})


def check_tables(model: Any, bits: int) -> None:
    """Raise StageError where a model (an MLModel) has no table of at most 2^bits values."""
    program = model.get_spec().mlProgram
    for function in program.functions.values():
        block = function.block_specializations[function.opset]
        tables = [one for one in block.operations if one.type == "constexpr_lut_to_dense"]
        if any(_entries(one) <= 2**bits for one in tables):
            return
    raise StageError(
        "coreml_from_exported_program: palette_bits",
        expected=f"weights of at most {2**bits} values",
        found="none",
        remedy="put palettize_weights with the same bits and group before it in the route",
    )


def _entries(table: Any) -> int:
    """Of a table: [values] before iOS 18, [groups…, values, 1] since."""
    if "lut" in table.attributes:
        return int(table.attributes["lut"].type.tensorType.dimensions[-1].constant.size)
    kept = table.inputs["lut"].arguments[0].value
    return int(kept.type.tensorType.dimensions[-2].constant.size)
