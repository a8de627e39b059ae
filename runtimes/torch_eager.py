"""Runs a component in PyTorch, in float32: the original that engines are compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffoundry.errors import (
    ArtifactError,
    ContractError,
    DeferredError,
    MissingToolError,
    UsageError,
)
from diffoundry.types import Array, Artifact, ArtifactType, Contract

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TorchEager:
    """Runtime: torch_module -> session, on "cpu" or "cuda"."""

    tools: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "numpy")
    extra: ClassVar[str] = "build"

    def accepts(self, artifact_type: ArtifactType) -> bool:
        return artifact_type.kind == "torch_module"

    def unavailable(self, device: str) -> Exception | None:
        """MissingToolError without torch, DeferredError without a CUDA device."""
        if device not in ("cpu", "cuda"):
            return UsageError("torch_eager: device", expected="cpu or cuda", found=device)
        if importlib.util.find_spec("torch") is None:
            return MissingToolError("torch_eager needs torch", expected="the extra 'build'",
                                    found="not installed",
                                    remedy="pip install 'diffoundry[build]'")  # fmt: skip
        if device == "cuda":
            import torch

            if not torch.cuda.is_available():
                return DeferredError("torch_eager: device cuda", expected="an NVIDIA GPU",
                                     found="none that torch can use on this host",
                                     remedy="run it on a host that has one")  # fmt: skip
        return None

    def open(
        self, artifact: Artifact, contract: Contract, device: str, threads: int = 0
    ) -> OpenedModule:
        """Load the module in float32. Raises ArtifactError, ModelError."""
        problem = self.unavailable(device)
        if problem is not None:
            raise problem
        if not self.accepts(artifact.type):
            raise ArtifactError(str(artifact.path), expected="a torch_module artifact",
                                found=artifact.type.kind)  # fmt: skip
        from diffoundry.models.components import load_component

        module = load_component(artifact.path, contract.component, dtype="float32")
        return OpenedModule(module, contract, device, threads)


class OpenedModule:
    """A float32 module with flat inputs and outputs. torch's settings are set for each call."""

    def __init__(
        self, module: nn.Module, contract: Contract, device: str = "cpu", threads: int = 0
    ) -> None:
        self._module = module.to(device).eval()
        self._contract, self._device, self._threads = contract, device, threads

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        tensors = [
            torch.from_numpy(feeds[spec.name]).to(self._device) for spec in self._contract.inputs
        ]
        with _pinned(self._threads), torch.inference_mode():
            found = self._module(*tensors)
        values = found if isinstance(found, tuple) else (found,)
        names = [spec.name for spec in self._contract.outputs]
        return {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)}

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Outputs of the leaf modules by module path, in execution order.

        A module that runs again has "#2" and so on behind its name. Raises ContractError for a
        name that did not run.
        """
        import torch

        found: dict[str, Array] = {}

        def hook(path: str) -> Any:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                count = sum(name == path or name.startswith(f"{path}#") for name in found)
                name = path if count == 0 else f"{path}#{count + 1}"
                if isinstance(output, torch.Tensor):
                    found[name] = output.detach().cpu().numpy()

            return keep

        handles = [
            module.register_forward_hook(hook(path))
            for path, module in self._module.named_modules()
            if path and not any(True for _ in module.children())
        ]
        try:
            self.infer(feeds)
        finally:
            for handle in handles:
                handle.remove()
        if names is None:
            return found
        unknown = sorted(set(names) - set(found))
        if unknown:
            raise ContractError(f"probe of {', '.join(unknown)}", expected="leaf modules that run",
                                found="unknown names")  # fmt: skip
        return {name: value for name, value in found.items() if name in set(names)}

    def precision_used(self) -> dict[str, Any]:
        """dtypes of the weights, torch's setting for products, TF32, threads."""
        import torch

        with _pinned(self._threads):
            return {
                "weights": sorted({str(p.dtype) for p in self._module.parameters()}),
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
                "tf32": "on" if torch.backends.cudnn.allow_tf32 else "off",
                "threads": torch.get_num_threads(),
                "device": self._device,
                "note": "every operator computes in float32",
            }

    def close(self) -> None:
        """Free the module."""
        self.__dict__.pop("_module", None)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Full float32 and `threads` threads (0: torch's choice) inside, as it was after."""
    import torch

    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.get_num_threads(),
    )
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.set_num_threads(before[2])
