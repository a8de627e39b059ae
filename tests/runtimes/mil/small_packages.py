"""Packages that coremltools makes of the small network and of smaller ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffoundry.types import Artifact, ArtifactType, Axis, AxisRef, Contract, TensorSpec
from tests.compilers import small_network as small
from tests.runtimes.mil.mil_cases import save

BITS = {"fp32": "FLOAT32", "fp16": "FLOAT16"}
SIDES = (1, 3, AxisRef("height"), AxisRef("width"))
PICTURE = Contract(
    "vae_decoder",
    (TensorSpec("latent", "float32", SIDES),),
    (TensorSpec("image", "float32", SIDES),),
    (Axis("height", 4, 8, 32, 4), Axis("width", 4, 8, 32, 4)),
)
IDS = Contract(
    "text_encoder",
    (TensorSpec("input_ids", "int64", (1, 5)),),
    (TensorSpec("prompt_embeds", "float32", (1, 5, 3)),),
    (),
)


class Picture(torch.nn.Module):
    """A decoder of two layers; `pixels` scales its picture beyond 0..255."""

    def __init__(self, pixels: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.pixels = torch.nn.GroupNorm(1, 3), pixels

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        found = torch.tanh(self.norm(self.conv(latent)))
        return found * 150 + 127.5 if self.pixels else found


def convert(
    module: torch.nn.Module,
    examples: Sequence[torch.Tensor],
    path: Path,
    outputs: Sequence[Any],
    moving: Any = None,
    **options: Any,
) -> Path:
    """torch.export and coremltools. `moving`: dynamic_shapes of torch.export."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module.eval(), tuple(examples), dynamic_shapes=moving, strict=False
        )
    return _convert(program, path, outputs, **options)


def convert_program(program: Any, contract: Contract, folder: Path, precision: str) -> Path:
    """An exported program of fixed shapes with the contract's outputs, in "fp32" or "fp16"."""
    import coremltools as ct

    outputs = [ct.TensorType(name=spec.name) for spec in contract.outputs]
    return _convert(program, folder / f"{precision}.mlpackage", outputs, precision=BITS[precision])


def _convert(
    program: Any,
    path: Path,
    outputs: Sequence[Any],
    opset: str = "iOS17",
    precision: str = "FLOAT32",
    **options: Any,
) -> Path:
    import coremltools as ct

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = program.run_decompositions({})
        for node in list(program.graph.nodes):
            if node.target == torch.ops.aten.alias.default:  # coremltools does not know it
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
        model = ct.convert(
            program,
            outputs=list(outputs),
            minimum_deployment_target=getattr(ct.target, opset),
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
            **options,
        )
        model.save(str(path))
    return path


def artifact(path: Path, precision: Any = "fp32") -> Artifact:
    return Artifact(ArtifactType("mlpackage", precision), path, "sha256:0", "unet")


def small_package(folder: Path, precision: str, gain: float = 1.0) -> Artifact:
    """The small network at its usual shape, in "fp32" or "fp16"."""
    import coremltools as ct

    feeds = [torch.from_numpy(feed) for feed in small.feeds_at().values()]
    outputs = [ct.TensorType(name="model_output")]
    network = small.small_network(gain)
    path = convert(
        network, feeds, folder / f"{precision}.mlpackage", outputs, precision=BITS[precision]
    )
    return artifact(path, precision)


def picture_package(path: Path, kind: str) -> Artifact:
    """`kind`: "fixed" (8×8), "enumerated" (8×8, 8×12, 16×8), "range" (4..32) or "image"."""
    import coremltools as ct

    examples = [torch.zeros(1, 3, 8, 8)]
    if kind == "image":
        outputs = [ct.ImageType(name="image", color_layout=ct.colorlayout.RGB)]
        return artifact(convert(Picture(pixels=True), examples, path, outputs))
    outputs = [ct.TensorType(name="image")]
    if kind == "fixed":
        return artifact(convert(Picture(), examples, path, outputs))
    sides = {2: 4 * torch.export.Dim("h", min=1, max=8), 3: 4 * torch.export.Dim("w", min=1, max=8)}
    shape: Any = (1, 3, ct.RangeDim(4, 32, 8), ct.RangeDim(4, 32, 8))
    if kind == "enumerated":
        shape = ct.EnumeratedShapes([(1, 3, 8, 8), (1, 3, 8, 12), (1, 3, 16, 8)])
    inputs = [ct.TensorType(name="latent", shape=shape)]
    return artifact(convert(Picture(), examples, path, outputs, moving=(sides,), inputs=inputs))


def functions_package(folder: Path) -> Artifact:
    """One function for 8×8, one for 12×8."""
    import coremltools as ct
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    descriptor = MultiFunctionDescriptor()
    for name, height in (("small", 8), ("tall", 12)):
        one = folder / f"{name}.mlpackage"
        convert(Picture(), [torch.zeros(1, 3, height, 8)], one, [ct.TensorType(name="image")],
                opset="iOS18")  # fmt: skip
        descriptor.add_function(str(one), "main", name)
    descriptor.default_function_name = "small"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_multifunction(descriptor, str(folder / "both.mlpackage"))
    return artifact(folder / "both.mlpackage")


def table_package(path: Path, table: Any) -> Artifact:
    """Rows of a table by int32 ids."""
    import numpy as np

    def emit() -> Any:
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil.block import curr_block

        ids = curr_block().inputs["input_ids"]
        return Builder.gather(x=table, indices=ids, axis=0, name="prompt_embeds")

    return artifact(save(emit, {"input_ids": np.zeros((1, 5), np.int32)}, path))


@functools.cache
def reference_picture(pixels: bool = False) -> torch.nn.Module:
    return Picture(pixels).eval()
