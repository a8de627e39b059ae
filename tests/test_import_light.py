"""A quick start: what must not be imported by `--help`, and by the types everything builds on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Each of these costs from 30 ms to 12 s. numpy and the others of the light base are here too: a
# command that only prints its options needs none of them.
HEAVY = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "PIL",
    "pydantic",
    "safetensors",
    "scipy",
    "skimage",
    "tokenizers",
    "torch",
    "transformers",
}

COMMANDS = ("build", "verify", "generate", "report", "bench", "profiles", "doctor")


def imported_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `code`."""
    program = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "import json\nprint()\nprint(json.dumps(sorted(m for m in sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout.splitlines()[-1])
    return {name.partition(".")[0] for name in modules}


def help_of(*arguments: str) -> set[str]:
    """Return what `diffoundry ARGUMENTS --help` imports."""
    argv = ["diffoundry", *arguments, "--help"]
    return imported_by(
        f"sys.argv = {argv!r}; from diffoundry.cli.main import main; sys.exit(main())"
    )


def test_help_imports_nothing_heavy() -> None:
    assert help_of() & HEAVY == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_imports_nothing_heavy(command: str) -> None:
    # typer builds its own converters with pydantic to describe a command's options
    assert help_of(command) & HEAVY <= {"pydantic"}


def test_types_and_errors_need_only_the_standard_library() -> None:
    bare = imported_by("pass")
    ours = imported_by("import diffoundry.types, diffoundry.errors")
    foreign = {name for name in ours - bare - {"diffoundry"} if name not in sys.stdlib_module_names}
    assert foreign == set()


def test_importing_every_base_package_leaves_torch_out() -> None:
    packages = [
        "exporters",
        "compilers",
        "runtimes",
        "profiles",
        "artifacts",
        "formats",
        "models",
        "sampling",
    ]
    code = "import " + ", ".join(f"diffoundry.{name}" for name in packages)
    assert (
        imported_by(code) & {"torch", "diffusers", "transformers", "onnx", "onnxruntime"} == set()
    )
