"""Writing a component whose layers were changed as a folder that the loader reads again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffoundry.formats import safetensors_file, torch_module
from diffoundry.models.surgery import Operation, read_surgery, write_surgery

if TYPE_CHECKING:
    import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_rewritten(
    folder: Path,
    source: Path,
    network: torch.nn.Module,
    replaced: Sequence[str] = (),
    operations: Sequence[Operation] = (),
) -> None:
    """`network`, which was loaded from `source`, as a folder: config, safetensors, surgery.json.

    `operations` come after those that `source` already has. Tensors of `source` that the network
    does not hold (the other half of an autoencoder) are copied, but not those of the layers named
    in `replaced`.
    """
    from safetensors import safe_open

    from diffoundry.models.weights import names_in_files

    folder.mkdir(parents=True)
    state: dict[str, Any] = {name: value.detach() for name, value in network.state_dict().items()}
    known = {in_file: name for name, in_file in names_in_files(source, state).items()}
    gone = {f"{layer}.{part}" for layer in replaced for part in ("weight", "bias")}
    for path in torch_module.find_weights(source):
        with safe_open(path, framework="pt") as file:
            for in_file in file.keys():  # noqa: SIM118 (not a dict)
                name = known.get(in_file, in_file)
                if name not in state and name not in gone:
                    state[name] = file.get_tensor(in_file)
    arrays = {name: value.numpy() for name, value in state.items()}
    safetensors_file.write_stream(folder / WEIGHTS, arrays, {"format": "pt"})
    config = torch_module.model_file(source, torch_module.CONFIG).read_bytes()
    (folder / torch_module.CONFIG).write_bytes(config)
    added = [*read_surgery(source), *operations]
    if added:
        write_surgery(folder, added)
