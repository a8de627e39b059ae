"""The PyTorch original as a reference: numpy in, numpy out, deterministic, never silently sick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from diffoundry.capture.precision import emulated_half, full_double
from diffoundry.errors import ModelError
from diffoundry.types import Array, Contract

if TYPE_CHECKING:
    import torch


class Reference:
    """One component in PyTorch fp32. `module.forward` takes and gives in contract order."""

    def __init__(self, module: torch.nn.Module, contract: Contract) -> None:
        self.module = module.eval()
        self.contract = contract

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in fp32. Raises ModelError where an output holds NaN or infinity."""
        import numpy as np

        self.contract.check_feeds(feeds)
        outputs = self._run(feeds)
        sick = [name for name, array in outputs.items() if not np.isfinite(array).all()]
        if sick:
            raise self._at_fault(feeds, sick)
        return outputs

    def infer_double(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute everything in float64; outputs are float64."""
        with full_double():
            return self._run({name: _widened(array) for name, array in feeds.items()})

    def infer_half(
        self, feeds: Mapping[str, Array], precision: Literal["fp16", "bf16"] = "fp16"
    ) -> tuple[dict[str, Array], bool]:
        """Compute as fp16 or bf16 would (emulated), weights rounded too; outputs are float32.

        Numbers given one per picture, such as the timestep, stay fp32, as diffusers keeps them.
        The second value says whether anything was beyond fp16's range (see `EmulatedHalf`).
        """
        import torch

        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        tensors = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
        halves = [v for v in tensors.values() if v.is_floating_point() and v.dim() > 1]
        for tensor in halves:
            tensor.copy_(tensor.to(dtype).float())
        with emulated_half(self._weights(), halves, dtype) as mode:
            outputs = self._call(tensors)
        return outputs, mode.overflowed

    def _weights(self) -> list[torch.Tensor]:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return [tensor for tensor in tensors if tensor.is_floating_point()]

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        return self._call({name: torch.from_numpy(array) for name, array in feeds.items()})

    def _call(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        import torch

        with torch.no_grad():
            result = self.module(*(tensors[spec.name] for spec in self.contract.inputs))
        outputs = result if isinstance(result, tuple) else (result,)
        return {
            spec.name: tensor.numpy()
            for spec, tensor in zip(self.contract.outputs, outputs, strict=True)
        }

    def _at_fault(self, feeds: Mapping[str, Array], sick: list[str]) -> ModelError:
        component = self.contract.component
        return ModelError(
            f"{component}: the model itself is at fault, not a conversion of it",
            expected="finite numbers from the PyTorch original in fp32",
            found=f"NaN or infinity in {', '.join(sick)}, first in {self._first_bad(feeds)}",
            remedy="repair or replace the model's weights; nothing built from them can be right",
        )

    def _first_bad(self, feeds: Mapping[str, Array]) -> str:
        """Name the module whose output is the first that is not finite, and its bad weights."""
        bad: list[str] = []
        hooks = [
            module.register_forward_hook(_note_if_bad(name or "the component", bad))
            for name, module in self.module.named_modules()
        ]
        try:
            self._run(feeds)
        finally:
            for hook in hooks:
                hook.remove()
        weights = [
            name for name, value in self.module.named_parameters() if not value.isfinite().all()
        ]
        first = bad[0] if bad else "an operation outside every module"
        if weights:
            first += f" (weights that are not finite: {', '.join(weights[:3])})"
        return first


def _widened(array: Array) -> Array:
    return array.astype("float64") if array.dtype.kind == "f" else array


def _note_if_bad(name: str, bad: list[str]) -> Any:
    import torch
    from torch.utils._pytree import tree_leaves

    def hook(module: Any, inputs: Any, output: Any) -> None:
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                bad.append(name)
                return

    return hook
