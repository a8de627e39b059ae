"""One picture from text with real-size engines: seconds to open each, seconds and memory in all.

    .venv/bin/python benchmarks/whole_picture.py --text-encoder onnx:DIR --unet onnx:DIR
        --vae-decoder onnx:DIR [--model DIR] [--side 512] [--steps 4] [--tile auto]

As `diffoundry generate` does it: each engine is opened when it is first called, and let go before
the next one where it is done. Rows say what the process held at most while it was that engine's
turn (libraries included), and wall and processor seconds (of all threads) of opening and of all its
calls. The step table is made by another process: this one never imports PyTorch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from make_sd15_lcm import ROOT
from real_engines import contract_of, open_engine, opened

from diffoundry.formats import step_table
from diffoundry.generation import TextToImage
from diffoundry.memory import peak_memory, reset_peak_memory
from diffoundry.models.pipeline import open_pipeline
from diffoundry.models.tokenizer import Tokenizer
from diffoundry.sessions import SessionOnDemand

TABLES = """
import sys
from pathlib import Path
from diffoundry.formats import step_table
from diffoundry.models.pipeline import open_pipeline
from diffoundry.sampling.probing import probe_scheduler
from diffoundry.sampling.schedulers import fitting
source = open_pipeline(sys.argv[1])
name = fitting(source.geometry, source.scheduler).default
table = probe_scheduler(name, source.scheduler, source.pipeline_class, True)
step_table.save(table, Path(sys.argv[2]))
"""


class Watched:
    """A session on demand that measures its opening, its calls, and the memory of its turn."""

    def __init__(self, name: str, engine: str, model: Path, threads: int) -> None:
        kind, _, folder = engine.partition(":")
        contract = contract_of(model, name)
        artifact = opened(Path(folder), kind)
        self.name, self.engine = name, engine
        self.opening = self.opening_cpu = self.calls = self.calls_cpu = 0.0
        self.count = self.peak = 0

        def open_it() -> Any:
            started, processor = time.perf_counter(), time.process_time()
            session = open_engine(artifact, contract, threads)
            self.opening = time.perf_counter() - started
            self.opening_cpu = time.process_time() - processor
            return session

        self._session = SessionOnDemand(open_it, contract, artifact.type.shape_policy)
        self.contract, self.policy = contract, self._session.policy

    def infer(self, feeds: Any) -> Any:
        if not self.count:
            reset_peak_memory()
        started, opening = time.perf_counter(), self.opening
        processor, opening_cpu = time.process_time(), self.opening_cpu
        found = self._session.infer(feeds)
        self.calls += time.perf_counter() - started - (self.opening - opening)
        self.calls_cpu += time.process_time() - processor - (self.opening_cpu - opening_cpu)
        self.count += 1
        self.peak = max(self.peak, peak_memory())
        return found

    def pause(self) -> None:
        self._session.pause()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("text-encoder", "unet", "vae-decoder"):
        parser.add_argument(f"--{name}", required=True, metavar="KIND:FOLDER")
    parser.add_argument("--model", type=Path, default=ROOT / "sd15-lcm")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tile", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/whole-picture"))
    options = parser.parse_args()
    tables = options.work / "steps"
    if not tables.is_dir():
        tables.mkdir(parents=True)
        command = [sys.executable, "-c", TABLES, str(options.model), str(tables)]
        subprocess.run(command, check=True)
    started = time.perf_counter()
    source = open_pipeline(options.model)
    engines = {
        "text_encoder": options.text_encoder,
        "unet": options.unet,
        "vae_decoder": options.vae_decoder,
    }
    sessions = {
        name: Watched(name, engine, options.model, options.threads)
        for name, engine in engines.items()
    }
    tokenizer = Tokenizer.open(source.tokenizer_path, source.geometry.tokens)
    pipeline = TextToImage(sessions, tokenizer, step_table.open_tables(tables), source.geometry)  # type: ignore[arg-type]
    tile = int(options.tile) if options.tile.isdecimal() else options.tile
    picture = pipeline.generate(
        ["a lighthouse at dusk"], steps=options.steps, height=options.side, width=options.side,
        tile=tile,
    )[0]  # fmt: skip
    seconds = time.perf_counter() - started
    print(f"\n{options.side} × {options.side}, {options.steps} steps, {options.threads} threads\n")
    print("| engine | opened, s | processor s | calls | s | processor s | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for one in sessions.values():
        opening = f"{one.opening:.2f} | {one.opening_cpu:.2f}"
        print(f"| {one.name} ({one.engine.partition(':')[0]}) | {opening} | {one.count} | "
              f"{one.calls:.2f} | {one.calls_cpu:.2f} | {one.peak / 1e9:.2f} |")  # fmt: skip
    opening = sum(one.opening for one in sessions.values())
    peak = max(one.peak for one in sessions.values())
    used = time.process_time()
    print(f"| all | {opening:.2f} | {sum(one.opening_cpu for one in sessions.values()):.2f} | | "
          f"{seconds:.2f} | {used:.2f} | {peak / 1e9:.2f} |")  # fmt: skip
    if "tiles" in picture.parameters:
        print(f"\ndecoded in {picture.parameters['tiles']}")


if __name__ == "__main__":
    main()
