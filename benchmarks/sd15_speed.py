"""Seconds, memory and size at the real size: our engines, PyTorch, and what others make.

    .venv/bin/python benchmarks/sd15_speed.py [--bundle DIR] [--engines NAME DIR ...] [--peers]
        [--only unet vae_decoder picture] [--contender TEXT ...] [--rounds 3] [--json FILE]

MODEL is `make_sd15_lcm.py`'s by default; 512×512, batch 1, 2 threads, 4 steps. `--engines NAME DIR`
takes a folder with `unet-…`, `vae_decoder-…` and `text_encoder-…`, or folders of just these names;
of `DIR:onnx`, those that end in it.
Each contender is a process of its own; its calls take turns with the others' of its group, and a
group is as large as memory allows. PyTorch eager is in every group: ratios hold within one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from preparing import prepare, size_bytes

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
WHAT = ("unet", "vae_decoder", "picture")
GB = 1e9
EAGER = "PyTorch eager"


@dataclass
class Contender:
    """Who takes part: how its process is started and told what to open, and what was measured."""

    name: str
    command: Sequence[str]
    order: dict[str, Any]
    size_bytes: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    opening: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int = 0
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def needs_bytes(self) -> float:
        """About what its process will hold: its files, mapped or read, and what a call needs."""
        return 1.35 * sum(self.size_bytes.values()) + 2.5 * GB


class Process:
    """A contender's process (see peers/answering.py)."""

    def __init__(self, contender: Contender) -> None:
        self._process = subprocess.Popen(
            [*contender.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=HERE / "peers",
        )  # fmt: skip

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer; {"problem": why} where it has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return dict(json.loads(self._process.stdout.readline()))
        except (OSError, ValueError):
            code = self._process.wait()
            why = f"signal {-code} (memory?)" if code < 0 else f"exit code {code}"
            return {"problem": f"its process ended: {why}"}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def groups_of(contenders: Sequence[Contender], limit_bytes: float) -> list[list[Contender]]:
    """PyTorch eager with as many others as memory allows, until all have had their turn."""
    eager, rest = contenders[0], list(contenders[1:])
    groups: list[list[Contender]] = []
    while rest or not groups:
        group = [eager]
        while rest and (
            len(group) == 1
            or sum(one.needs_bytes for one in group) + rest[0].needs_bytes <= limit_bytes
        ):
            group.append(rest.pop(0))
        groups.append(group)
    return groups


def run_group(group: Sequence[Contender], what: Sequence[str], rounds: int, warm_ups: int) -> None:
    """Open all, let their calls take turns, note seconds, ratios to the first, and memory."""
    processes: dict[str, Process] = {}
    for one in group:
        process = Process(one)
        said = process.ask({"open": {**one.order, "what": list(what), "name": one.name}})
        if "problem" in said:
            one.problem = said["problem"]
            process.close()
            continue
        one.opening, one.notes, processes[one.name] = said["seconds"], said["notes"], process
    here = [one for one in group if one.name in processes]
    for part in what:
        times = take_turns(here, processes, part, rounds, warm_ups)
        base = times.get(group[0].name, [])
        for one in here:
            found = times[one.name]
            if found and base:
                one.ratios[part] = median(found) / median(base)
            one.seconds.setdefault(part, []).extend(found)
        print(f"  {part}: " + ", ".join(f"{k} {median(v):.2f} s" for k, v in times.items() if v),
              file=sys.stderr, flush=True)  # fmt: skip
    for one in here:
        if not one.problem:
            one.peak_bytes = processes[one.name].ask({"memory": True})["peak"]
        processes[one.name].close()


def take_turns(
    here: Sequence[Contender],
    processes: Mapping[str, Process],
    part: str,
    rounds: int,
    warm_ups: int,
) -> dict[str, list[float]]:
    """Seconds of each round by name; every round begins with another contender."""
    times: dict[str, list[float]] = {one.name: [] for one in here}
    for number in range(-warm_ups, rounds):
        shift = number % len(here) if here else 0
        for one in [*here[shift:], *here[:shift]]:
            if one.problem:
                continue
            said = processes[one.name].ask({"call": part, "number": max(number, 0)})
            one.problem = said.get("problem", "")
            if number >= 0 and not one.problem:
                times[one.name].append(said["seconds"])
    return times


def contenders_of(options: argparse.Namespace) -> list[Contender]:
    """PyTorch, our engines, the peers; what is not to be had here has a problem."""
    base = {"model": str(Path(options.model).resolve()), "threads": options.threads,
            "side": options.side, "steps": options.steps}  # fmt: skip
    own = [sys.executable, "ours.py"]
    parts = [*options.only, *(["text_encoder"] if "picture" in options.only else [])]
    if "picture" in options.only:
        parts = ["unet", "vae_decoder", "text_encoder"]
    weights = _original_bytes(Path(options.model), parts)
    found = [Contender(EAGER, own, {**base, "kind": "eager"}, weights)]
    if not options.no_compile:
        found.append(Contender("torch.compile", own, {**base, "kind": "compiled"}, weights))
    for name, folder in options.engines:
        engines = {part: _engine(folder, part) for part in parts}
        missing = [part for part, path in engines.items() if path is None]
        named = {part: str(path) for part, path in engines.items()}
        one = Contender(name, own, {**base, "kind": "engines", "engines": named})
        one.problem = f"no engine of {', '.join(missing)} in its folder" if missing else ""
        one.size_bytes = {p: _bytes(f) for p, f in engines.items() if f is not None}
        found.append(one)
    if options.bundle:
        found += _of_bundle(options.bundle, own, base)
    if options.peers:
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        root = Path(options.peers_folder).resolve()
        for peer in prepare(
            Path(options.model).resolve(), root, say, not options.peers_as_they_are
        ):
            order = {**base, "kind": peer.kind, "folder": str(peer.folder)}
            sizes = size_bytes(peer.folder, parts) if not peer.problem else {}
            found.append(Contender(peer.name, [str(peer.python), "theirs.py"], order, sizes,
                                   peer.problem))  # fmt: skip
            if peer.kind == "openvino" and not peer.problem:
                pinned = {**order, "config": {"INFERENCE_PRECISION_HINT": "f32"}}
                found.append(Contender(f"{peer.name}, pinned to f32",
                                       [str(peer.python), "theirs.py"], pinned, sizes))  # fmt: skip
    if options.contender:
        chosen = [c.lower() for c in options.contender]
        found = [one for one in found
                 if one.name == EAGER or any(c in one.name.lower() for c in chosen)]  # fmt: skip
    return found


def _of_bundle(folder: str, own: list[str], base: dict[str, Any]) -> list[Contender]:
    from diffoundry.artifacts.bundle import open_bundle

    bundle = open_bundle(Path(folder))
    order = {**base, "kind": "bundle", "folder": str(bundle.path.resolve())}
    return [
        Contender(
            variant.name,
            own,
            {**order, "variant": variant.name},
            {name: engine.size_bytes for name, engine in variant.engines.items()},
        )
        for variant in bundle.manifest.variants
    ]


def _engine(where: str, component: str) -> Path | None:
    """`DIR/unet`, or the first folder that begins with "unet-"; of "DIR:onnx", "unet-onnx"."""
    folder, _, kind = where.partition(":")
    if (Path(folder) / component).is_dir():
        return (Path(folder) / component).resolve()
    pattern = f"{component}-{kind or '*'}"
    found = sorted(path for path in Path(folder).glob(pattern) if path.is_dir())
    return found[0].resolve() if found else None


def _original_bytes(model: Path, parts: Sequence[str]) -> dict[str, int]:
    return {part: _bytes(model / part.removesuffix("_decoder"), "*.safetensors") for part in parts}


def _bytes(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def print_table(contenders: Sequence[Contender], what: Sequence[str]) -> None:
    """One row each; a ratio is seconds over PyTorch eager's in the same group."""
    table = Table("", *(f"{part}, s" for part in what), *(f"{part}, × eager" for part in what),
                  "peak GB", "files GB", "opened in s", "")  # fmt: skip
    for one in contenders:
        seconds = [f"{median(one.seconds[p]):.2f}" if one.seconds.get(p) else "-" for p in what]
        ratios = [f"{one.ratios[p]:.2f}" if p in one.ratios else "-" for p in what]
        note = one.problem[:120] or ", ".join(f"{k} {v}" for k, v in one.notes.items())
        table.add_row(one.name, *seconds, *ratios,
                      f"{one.peak_bytes / GB:.2f}" if one.peak_bytes else "-",
                      f"{sum(one.size_bytes.values()) / GB:.2f}",
                      f"{sum(one.opening.values()):.1f}" if one.opening else "-", note)  # fmt: skip
    Console(width=180).print(table)


def document_of(contenders: Sequence[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """What `--json` writes."""
    keys = ("name", "size_bytes", "problem", "opening", "notes", "seconds", "ratios", "peak_bytes")
    return {
        "schema": "diffoundry.sd15_speed/1.0",
        "settings": {
            name: getattr(options, name) for name in ("threads", "side", "steps", "rounds")
        },
        "contenders": [{key: getattr(one, key) for key in keys} for one in contenders],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(BUILD / "models" / "sd15-lcm"))
    parser.add_argument("--bundle", help="every variant of this bundle takes part")
    parser.add_argument("--engines", nargs=2, action="append", default=[], metavar=("NAME", "DIR"))
    parser.add_argument("--peers", action="store_true", help="with optimum-onnx and optimum-intel")
    parser.add_argument("--peers-folder", default=str(BUILD / "peers"))
    parser.add_argument(
        "--peers-as-they-are", action="store_true", help="make none that is missing"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument(
        "--contender", nargs="+", help="only those whose names contain one of these"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory-gb", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    contenders = contenders_of(options)
    able = [one for one in contenders if not one.problem]
    for group in groups_of(able, options.memory_gb * GB):
        print(", ".join(one.name for one in group), file=sys.stderr, flush=True)
        run_group(group, options.only, options.rounds, options.warm_ups)
        if options.json:
            options.json.write_text(json.dumps(document_of(contenders, options), indent=1) + "\n")
    print_table(contenders, options.only)


if __name__ == "__main__":
    main()
