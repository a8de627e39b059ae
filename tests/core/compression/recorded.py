"""Recorded calls of the small network, and plans of it."""

from __future__ import annotations

import functools

import numpy as np
import torch

from diffoundry.compression.estimating import PlanSettings, complete, draft
from diffoundry.compression.ranges import Seen
from diffoundry.compression.statistics import feeds_of
from diffoundry.formats.quant_plan import QuantPlan
from diffoundry.formats.recording import Call
from tests.compilers.small_network import CONTRACT, feeds_at, reference, small_network


def calls_of(network, count: int = 4, first: int = 0) -> list[Call]:
    """Calls at one shape whose outputs are `network`'s own."""
    made = []
    for seed in range(first, first + count):
        feeds = feeds_at(seed=seed)
        outputs = {"model_output": reference(network, feeds)}
        made.append(Call(feeds, outputs, CONTRACT.opt_shape(), ""))
    return made


def watched_by_hooks(module, contract, calls):
    """What every convolution and linear layer takes and gives, without any exported graph."""
    taken, given, hooks = {}, {}, []
    for name, layer in module.named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            continue
        axis = 1 if isinstance(layer, torch.nn.Conv2d) else -1
        taken[name], given[name] = Seen(axis), Seen(axis)

        def hook(_, inputs, output, name=name):
            taken[name].add(inputs[0].numpy())
            given[name].add(output.numpy())

        hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        for call in calls:
            module(*feeds_of(contract, call.feeds))
    for handle in hooks:
        handle.remove()
    return taken, given


def plan_of(network, calls, settings: PlanSettings | None = None, contract=CONTRACT) -> QuantPlan:
    """A plan of `network` from its own inputs."""
    settings = settings or PlanSettings()
    taken, given = watched_by_hooks(network, contract, calls)
    layers = draft(network, settings)
    return complete(network.state_dict(), "unet", "hooks", settings, layers, taken, given)


@functools.cache
def shared():
    """The small network, six calls, and its plan with every layer static. Change nothing in it."""
    network = small_network()
    calls = calls_of(network, 6)
    return network, calls, plan_of(network, calls, PlanSettings(keep=()))


def state_of(module) -> dict[str, np.ndarray]:
    return {name: value.detach().clone().numpy() for name, value in module.named_parameters()}
