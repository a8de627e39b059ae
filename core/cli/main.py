"""`diffoundry`: build, verify, generate, profiles, doctor. Heavy imports wait for their command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import diffoundry
from diffoundry.cli import failing
from diffoundry.errors import DiffoundryError, ExitCode


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "8 GB" or "8000000000". Raises typer.BadParameter."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is no size; write for example 8GiB") from None


app = typer.Typer(
    name="diffoundry",
    help="Compile a diffusion pipeline into engines that carry the proof that they are right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Full = Annotated[bool, typer.Option("--full", help="Every check on a line of its own.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by build.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"diffoundry {diffoundry.__version__}")
        raise typer.Exit()


@app.command()
def build(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers directory, or a hub id. Left out: the embedded model shapes-lcm.",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            "-p",
            metavar="NAME_OR_FILE",
            help="What to build.  [default: onnx-cpu]",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the bundle goes.")
    ] = Path("bundle"),
    component: Annotated[
        list[str] | None,
        typer.Option(
            "--component", help="Build and check only this one (repeat for more); no bundle."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of a hub model, to pin what is built.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every stage with its key, hit or miss.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run every stage again, whatever the store holds.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Worker processes at once; each needs memory of its own.")
    ] = 2,
    require_gain: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="RATIO",
            help="Publish a compressed variant only where its picture is so many times as fast as "
            "with its fp32 baseline here.",
        ),
    ] = None,
    drift_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="DB",
            help="SQNR in dB that every component of a lossy variant must keep against the "
            "original; decides which layers stay in float. In place of the profile's.",
        ),
    ] = None,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory that stages which run at once may hold together, for example 8GiB. What "
            "is expected to need more is refused before anything starts.",
        ),
    ] = None,
    preview_vae: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Build the decoder of this AutoencoderTiny besides, for `generate --preview`; its "
            "diffusers folder, or that of a pipeline which has one.",
        ),
    ] = None,
    full: Full = False,
    json: Json = False,
) -> None:
    """Build, check and publish a bundle of engines."""
    from diffoundry.cli.build import only_profile, run_build

    raise typer.Exit(
        run_build(
            model=model,
            profile=only_profile(profile or ["onnx-cpu"]),
            out=out,
            components=tuple(component or ()),
            revision=revision,
            dry_run=dry_run,
            use_cache=not no_cache,
            jobs=jobs,
            as_json=json,
            full=full,
            require_gain=require_gain,
            drift_budget_db=drift_budget,
            memory_budget=memory_budget,
            preview_vae=preview_vae,
        )
    )


@app.command()
def verify(
    bundle: BundlePath,
    variant: Annotated[
        str | None, typer.Option(help="Check only this variant (default: all).")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write a JUnit XML report.")
    ] = None,
    allow_deferred: Annotated[
        bool, typer.Option("--allow-deferred", help="Exit 0 when only deferred checks are left.")
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Write the checks done here into evidence/.")
    ] = False,
    full: Full = False,
    json: Json = False,
) -> None:
    """Check a bundle: digests first, then parity from its golden vectors. Needs no PyTorch."""
    from diffoundry.cli.verify import run_verify

    raise typer.Exit(run_verify(bundle, variant, junit, allow_deferred, complete, json, full))


@app.command()
def generate(
    bundle: BundlePath,
    prompt: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="What should be in the picture.")
    ],
    negative: Annotated[str, typer.Option(help="What should not (not for LCM).")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: the bundle's.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures a prompt; seeds count up.")] = 1,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's own.")] = None,
    variant: Annotated[str | None, typer.Option(help="Which engines; default: chosen.")] = None,
    power: Annotated[
        Literal["low", "balanced", "full"] | None,
        typer.Option(help="Among the variants that were built for this power."),
    ] = None,
    tile: Annotated[
        str,
        typer.Option(
            metavar="auto|off|N",
            help="Decode large pictures in tiles of at most N pixels a side, which needs less "
            "memory and changes them a little; auto: above 640 × 640.",
        ),
    ] = "auto",
    preview: Annotated[
        bool,
        typer.Option(
            "--preview", help="Decode with the bundle's preview decoder: quick, less like."
        ),
    ] = False,
    preview_from: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="The same with the decoder of another bundle."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the pictures.")
    ] = Path("pictures"),
    json: Json = False,
) -> None:
    """Make pictures with the engines of a bundle alone. Needs no PyTorch."""
    from diffoundry.cli.generate import run_generate

    raise typer.Exit(
        run_generate(
            bundle_path=bundle,
            prompts=prompt,
            negative=negative,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            seed=seed,
            count=count,
            height=height,
            width=width,
            variant=variant,
            power=power,
            tile=tile,
            preview=preview,
            preview_from=preview_from,
            out=out,
            as_json=json,
        )
    )


@app.command()
def report(
    bundle: BundlePath,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: report.html; --json: no page."),
    ] = None,
    json: Json = False,
) -> None:
    """Write one self-contained HTML page: pictures, parity, sizes, costs, lineage."""
    from diffoundry.cli.report import run_report

    raise typer.Exit(run_report(bundle, out, json))


@app.command()
def bench(
    bundle: BundlePath,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The PyTorch original; default: the embedded model's."),
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this variant (repeat for more).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is called.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For everyone; default: one a core.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Pictures at once.")] = "1,2,4",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile takes a minute or more.")
    ] = True,
    quality: Annotated[
        bool, typer.Option("--quality", help="Read back what the pictures show.")
    ] = False,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Pictures a variant for --quality; default: 500.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CLIP model for --quality; a local folder.")
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(metavar="FILE", help="LPIPS weights for --quality; safetensors.")
    ] = None,
    fid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="FID's InceptionV3; safetensors.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write it into evidence/; the fastest is then chosen.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure engines beside PyTorch: seconds, memory, file sizes, energy, quality."""
    from diffoundry.cli.bench import run_bench
    from diffoundry.quality.metrics import MetricFiles

    raise typer.Exit(
        run_bench(
            bundle_path=bundle,
            model=model,
            variants=tuple(variant or ()),
            rounds=rounds,
            threads=threads,
            batches=batch,
            compiled=compiled,
            quality=quality,
            pairs=pairs,
            metrics=MetricFiles(clip, lpips, fid),
            save=save,
            as_json=json,
        )
    )


@app.command()
def profiles(json: Json = False) -> None:
    """List the shipped profiles."""
    from diffoundry.cli.profiles import run_profiles

    raise typer.Exit(run_profiles(json))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed, what each target still needs, and the exact install line."""
    from diffoundry.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(json))


def main() -> None:
    """Entry point: turns errors into one message and an exit code."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        failing.complain(
            "interrupted: everything finished is kept; run the same command to continue"
        )
        code = ExitCode.INTERRUPTED
    except DiffoundryError as error:
        code = failing.report(error)
    except Exception as error:  # noqa: BLE001 - whatever is not click's is raised again
        code = failing.usage_or_raise(error)
    sys.exit(int(code or 0))


if __name__ == "__main__":
    main()
