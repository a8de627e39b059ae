"""`diffoundry profiles`: the shipped profiles and what each makes."""

from __future__ import annotations

from diffoundry.cli.console import console, print_json
from diffoundry.errors import ExitCode
from diffoundry.planning.planner import vocabulary
from diffoundry.profiles.reading import read_profile, shipped_profiles


def run_profiles(as_json: bool) -> ExitCode:
    """Print every shipped profile with its variants."""
    known = vocabulary()
    found = [read_profile(name, known) for name in shipped_profiles()]
    if as_json:
        print_json(
            [
                {
                    "name": p.name,
                    "description": p.description,
                    "file": str(shipped_profiles()[p.name]),
                    "variants": [
                        {
                            "name": v.name,
                            "runtime": v.runtime,
                            "device": v.device,
                            "precision": v.precision,
                            "shapes": v.shapes,
                        }
                        for v in p.variants
                    ],
                }
                for p in found
            ]
        )
        return ExitCode.DONE
    from rich.table import Table

    table = Table("profile", "makes", "variants", box=None, pad_edge=False)
    for p in found:
        table.add_row(p.name, p.description, ", ".join(v.name for v in p.variants))
    console().print(table)
    return ExitCode.DONE
