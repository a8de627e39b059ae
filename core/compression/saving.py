"""Writes a component whose network was changed, as a folder that loads again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.compression.pruning import Cut, network_of
from diffoundry.formats import torch_module
from diffoundry.models.surgery import Operation, Prune, read_surgery, write_surgery

if TYPE_CHECKING:
    import torch

    from diffoundry.models.pruning import Site

WEIGHTS = "diffusion_pytorch_model.safetensors"


def operation_of(site: Site, kept: Sequence[int]) -> Prune:
    """The entry of surgery.json for a cut."""
    names: dict[str, Any] = {
        kind: f"prune_{kind}" for kind in ("channels", "feed_forward", "heads")
    }
    return Prune(operation=names[site.kind], module=site.module, units=site.units, kept=tuple(kept))


def record_of(cut: Cut) -> dict[str, Any]:
    """The entry of prune.json for a cut."""
    return {
        "kind": cut.site.kind,
        "module": cut.site.module,
        "units": cut.site.units,
        "kept": len(cut.kept),
        "damage": float(f"{cut.damage:.4g}"),
    }


def write_module(
    folder: Path, source: Path, module: torch.nn.Module, operations: Sequence[Operation]
) -> None:
    """The component as a folder: config, the network's tensors as they are now, and a
    surgery.json of the source's operations and these.

    Tensors that the component does not use (the other half of an autoencoder) are copied.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from diffoundry.models.weights import names_in_files

    folder.mkdir(parents=True)
    state: dict[str, Any] = network_of(module).state_dict()
    names = {in_file: name for name, in_file in names_in_files(source, state).items()}
    tensors = {}
    for path in torch_module.find_weights(source):
        with safe_open(path, framework="pt") as file:
            for in_file in file.keys():  # noqa: SIM118 (not a dict)
                name = names.get(in_file, in_file)
                value = state[name] if name in state else file.get_tensor(in_file)
                tensors[name] = value.detach().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = torch_module.model_file(source, torch_module.CONFIG).read_bytes()
    (folder / torch_module.CONFIG).write_bytes(config)
    everything = [*read_surgery(source), *operations]
    if everything:
        write_surgery(folder, everything)
