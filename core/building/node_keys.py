"""The key of a node: what its stage is, and what the runtimes that it opens engines with are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffoundry.discovery import RUNTIME_PACKAGE, runtime_named, stage_class, stage_modules
from diffoundry.errors import DeferredError
from diffoundry.planning.graph import Node
from diffoundry.planning.keys import stage_key


def key_of(node: Node, digests: Mapping[str, str], contracts: Mapping[str, Any]) -> str:
    """The key of a node whose inputs have these digests."""
    bound_to = getattr(stage_class(node.stage), "bound_to", lambda: None)()
    return stage_key(
        stage=node.stage,
        module=stage_modules()[node.stage],
        options=node.options,
        outputs=node.outputs,
        inputs=digests,
        contracts=contracts,
        tools=tools_of(node),
        plugins=_plugins_of(node),
        bound_to=bound_to or _deferred_here(node) or _other_arithmetic_here(node),
    )


def _runtimes_of(node: Node) -> tuple[str, ...]:
    """The runtime that a check opens engines with, and those that may stand in for it."""
    runtime = node.options.get("runtime")
    if not isinstance(runtime, str):
        return ()
    return (runtime, *getattr(runtime_named(runtime), "stand_ins", ()))


def tools_of(node: Node) -> tuple[str, ...]:
    """The stage's tools, and those of the runtimes that a check may open engines with."""
    more = (tool for name in _runtimes_of(node) for tool in runtime_named(name).tools)
    return tuple(dict.fromkeys((*stage_class(node.stage).tools, *more)))


def _plugins_of(node: Node) -> tuple[str, ...]:
    """Modules that a stage finds by name at run time, which its imports don't show."""
    return tuple(f"{RUNTIME_PACKAGE}.{name}" for name in _runtimes_of(node))


def _other_arithmetic_here(node: Node) -> str | None:
    """What a check's key is bound to where this processor cannot compute as the variant asks: what
    is deferred here is not another host's answer, and the other way round."""
    names = _runtimes_of(node)
    computes = getattr(runtime_named(names[0]), "computes_in", None) if names else None
    asked, device = node.options.get("precision"), str(node.options.get("device", "cpu"))
    found = computes(asked, device) if computes is not None else asked
    return None if found == asked else f"{asked} is computed in {found} here"


def _deferred_here(node: Node) -> str | None:
    """What a check's key is bound to where its runtime is deferred: which stand-ins are here.

    A host that has the runtime, or gets it later, must not be told "deferred" out of the store.
    """
    names = _runtimes_of(node)
    device = str(node.options.get("device", "cpu"))
    if not names or not isinstance(runtime_named(names[0]).unavailable(device), DeferredError):
        return None
    here = [name for name in names[1:] if runtime_named(name).unavailable("cpu") is None]
    return f"{names[0]} on {device} is deferred; here: {', '.join(here) or 'no stand-in'}"
