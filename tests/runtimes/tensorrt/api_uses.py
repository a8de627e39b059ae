"""Collects from our own source what it uses of TensorRT's API, and checks it against the real one.

`collect` reads the syntax trees, so that the list cannot fall behind the code. `CHECK` runs in a
process that has the real bindings.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What our names hold. `CHECK` compares it with what the calls that fill them really return.
RECEIVERS = {
    "trt": "",
    "self._trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "e": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "plan": "IHostMemory",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "inspector": "EngineInspector",
}


@dataclass
class Uses:
    """`chains`: [class, [member, call or None, stored], …], a call being [positional, keywords].

    `fills`: (name, chain) of every name that is given the result of a chain that ends in a call.
    """

    chains: list[list[Any]] = field(default_factory=list)
    fills: list[tuple[str, list[Any]]] = field(default_factory=list)


def collect(*sources: str) -> Uses:
    """Everything that these source texts do with TensorRT's objects."""
    uses = Uses()
    for source in sources:
        tree = ast.parse(source)
        inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Call) and id(node) not in inner | called:
                chain = _chain(node)
                if chain is not None and len(chain) > 1:
                    uses.chains.append(chain)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                chain = _chain(node.value)
                if chain is not None and len(node.targets) == 1:
                    uses.fills.append((ast.unparse(node.targets[0]), chain))
    return uses


def collect_files(folder: Path) -> Uses:
    """The uses of every module in a folder."""
    return collect(*(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))))


def _chain(node: ast.expr) -> list[Any] | None:
    """`builder.create_network(1).name` -> ["Builder", ["create_network", [1, []], False], …]."""
    call = None
    if isinstance(node, ast.Call):
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        count = None if starred else len(node.args)
        call, node = [count, [keyword.arg for keyword in node.keywords]], node.func
    if ast.unparse(node) in RECEIVERS and call is None:
        return [RECEIVERS[ast.unparse(node)]]
    if not isinstance(node, ast.Attribute):
        return None
    before = _chain(node.value)
    if before is None:
        return None
    return [*before, [node.attr, call, isinstance(node.ctx, ast.Store)]]


CHECK = r'''
import re
from diffoundry.runtimes.tensorrt.bindings import load
trt = load()

def split(text):
    """Top-level commas only: types have brackets and commas of their own."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += letter in "[(<"
        depth -= letter in "])>"
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [part for part in [*parts, current.strip()] if part]

def signatures(function, name):
    """(parameters without self, what it returns) of every overload."""
    lines = (function.__doc__ or "").splitlines()
    found = [re.match(rf"(?:\d+\. )?{name}\((.*)\) -> (.+)$", line) for line in lines]
    return [([p for p in split(m[1]) if not p.startswith("self")], m[2].strip())
            for m in found if m and "*args" not in m[1]]

def fits(parameters, call):
    count, keywords = call
    names = [p.split(":")[0].strip() for p in parameters]
    required = [p.split(":")[0].strip() for p in parameters if " = " not in p]
    if any(k not in names for k in keywords):
        return False
    if count is None:
        return True
    given = set(names[:count]) | set(keywords)
    return count + len(keywords) <= len(names) and set(required) <= given

def named(text):
    """The class in "tensorrt_bindings.tensorrt.IHostMemory" or "nvonnxparser::IParserError"."""
    name = re.split(r"[.:]+", text)[-1]
    return {"IParserError": "ParserError"}.get(name, name)

problems, checked = [], 0

def step(owner, label, member, call, stored):
    """Check one member of a class or of the module; what it gives: a class, an enum, a name."""
    global checked
    checked += 1
    where = f"{label}.{member}"
    if not hasattr(owner, member):
        problems.append(f"{where} does not exist")
        return None
    found = getattr(owner, member)
    if stored:
        if not isinstance(found, property) or found.fset is None:
            problems.append(f"{where} cannot be set")
        return None
    if call is None:
        if callable(found) and not isinstance(found, type) and not isinstance(found, property):
            problems.append(f"{where} is a method, used as a value")
        return None if isinstance(found, property) else found
    if isinstance(found, property):
        problems.append(f"{where} is a property, called")
        return None
    if isinstance(found, type):
        overloads = [(p, member) for p, _ in signatures(found.__init__, "__init__")]
    else:
        overloads = signatures(found, member)
    matching = [returned for parameters, returned in overloads if fits(parameters, call)]
    if overloads and not matching:
        problems.append(f"{where} is called with {call}, it takes {overloads}")
    return getattr(trt, named(matching[0]), None) if matching else None

def follow(chain):
    owner, label = (getattr(trt, chain[0], None), chain[0]) if chain[0] else (trt, "trt")
    for member, call, stored in chain[1:]:
        if owner is None:
            break
        owner, label = step(owner, label, member, call, stored), f"{label}.{member}"
    return owner

for chain in data["chains"]:
    follow(chain)
for name, chain in data["fills"]:
    given = follow(chain)
    declared = data["receivers"].get(name)
    ours = isinstance(given, type) and given.__module__.startswith("tensorrt")
    if ours and given.__name__ != declared:
        problems.append(f"{name} is given a {given.__name__}, RECEIVERS says {declared}")
problems = list(dict.fromkeys(problems))
answer({"version": trt.__version__, "problems": problems, "checked": checked})
'''
