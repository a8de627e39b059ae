"""Reads a profile and reports all of its mistakes at once, with near-miss suggestions."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from diffoundry.errors import ProfileError
from diffoundry.profiles import profile as schema
from diffoundry.profiles.profile import Profile
from diffoundry.types import Limits

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Vocabulary:
    """The names a profile may use, as data (planning fills it in)."""

    stages: Mapping[str, Mapping[str, Any]]
    """Stage name -> its option names and their defaults."""
    runtimes: tuple[str, ...]
    components: tuple[str, ...]


def shipped_profiles() -> dict[str, Path]:
    """Name -> file of every shipped profile."""
    return {path.stem: path for path in sorted(HERE.glob("*.toml"))}


def read_profile(name_or_file: str, vocabulary: Vocabulary) -> Profile:
    """Read a shipped profile by name, or a TOML file by path.

    Raises ProfileError that lists every mistake found.
    """
    path = _locate(name_or_file)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(
            f"profile {path}", expected="a TOML file", found=str(error), remedy="mend that line"
        ) from error
    problems = _include(data, path)
    profile = None
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        problems += [_in_words(entry) for entry in error.errors()]
    problems += _unknown_names(data, vocabulary)
    if problems or profile is None:
        raise ProfileError(
            f"profile {path}",
            expected=f"a valid {schema.SCHEMA} file",
            found=f"{len(problems)} mistake(s):" + "".join(f"\n    - {p}" for p in problems),
            remedy="mend all of these; docs/profiles.md describes every field",
        )
    return profile


def _include(data: dict[str, Any], path: Path) -> list[str]:
    """Add the variants of the profiles that `data` includes after its own; return what is wrong.

    Limits that hold for a whole included profile go with its variants; its axes, prompts and
    checks do not: one build has one of each.
    """
    names = data.get("include", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []  # pydantic says so
    problems = []
    variants = list(data.get("variants", []))
    for position, name in enumerate(names):
        where = f"include.{position}"
        known = [one for one in shipped_profiles() if one != path.stem]
        if name not in known:
            problems.append(f"{where}: no shipped profile {name!r}{suggestion(name, known)}")
            continue
        inner = tomllib.loads(shipped_profiles()[name].read_text(encoding="utf-8"))
        if "include" in inner:
            problems.append(f"{where}: {name} includes others itself; name those instead")
            continue
        limits = inner.get("limits", {})
        for variant in inner["variants"]:
            variants.append({**variant, "limits": {**limits, **variant.get("limits", {})}})
    if names:
        data["variants"] = variants
    return problems


def _locate(name_or_file: str) -> Path:
    shipped = shipped_profiles()
    if name_or_file in shipped:
        return shipped[name_or_file]
    path = Path(name_or_file)
    if path.is_file():
        return path
    raise ProfileError(
        f"profile {name_or_file!r}",
        expected=f"a TOML file or one of {', '.join(shipped)}",
        found="no such profile or file",
        remedy=suggestion(name_or_file, shipped).strip(" ()") or "see `diffoundry profiles`",
    )


def suggestion(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" when something close is known, else ""."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _in_words(entry: Any) -> str:
    """One pydantic error as "variants.0.route: what is wrong (did you mean …?)"."""
    where = ".".join(str(part) for part in entry["loc"] if str(part)[:1] != "[")
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        key = str(entry["loc"][-1])
        return f"{where}: no such field{suggestion(key, _all_fields())}"
    if entry["type"] == "literal_error":
        choices = [
            c.strip().strip("'") for c in entry["ctx"]["expected"].replace(" or ", ",").split(",")
        ]
        return f"{where}: {entry['input']!r} is none of {', '.join(choices)}" + suggestion(
            entry["input"], choices
        )
    if entry["type"] == "too_short" and where.endswith(".shapes"):
        return f"{where}: a list of shapes needs at least one"
    if entry["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {message}, found {entry['input']!r}"


def _all_fields() -> set[str]:
    models = [m for m in vars(schema).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    names = {field.alias or name for m in models for name, field in m.model_fields.items()}
    return names | {field.name for field in dataclasses.fields(Limits)}


def _unknown_names(data: Mapping[str, Any], known: Vocabulary) -> list[str]:
    """Mistakes that only the installed stages, runtimes and components reveal."""
    problems: list[str] = []
    variants = data.get("variants", [])
    for index, variant in enumerate(variants if isinstance(variants, list) else []):
        if not isinstance(variant, dict):
            continue
        where = f"variants.{index}"
        runtime = variant.get("runtime")
        if isinstance(runtime, str) and runtime not in known.runtimes:
            problems.append(
                f"{where}.runtime: no runtime {runtime!r}{suggestion(runtime, known.runtimes)}"
            )
        routes = {f"{where}.route": variant.get("route", [])}
        overrides = variant.get("component_routes", {})
        for component, route in overrides.items() if isinstance(overrides, dict) else ():
            routes[f"{where}.component_routes.{component}"] = route
            if component not in known.components:
                problems.append(
                    f"{where}.component_routes: no component {component!r}"
                    + suggestion(component, known.components)
                )
        for place, route in routes.items():
            for position, request in enumerate(route if isinstance(route, list) else []):
                if isinstance(request, dict):
                    problems += _stage_problems(f"{place}.{position}", request, known)
    return problems


def _stage_problems(where: str, request: Mapping[str, Any], known: Vocabulary) -> list[str]:
    name = request.get("stage")
    if not isinstance(name, str):
        return []
    if name not in known.stages:
        return [f"{where}.stage: no stage {name!r}{suggestion(name, known.stages)}"]
    options = known.stages[name]
    problems = []
    for key, value in request.items():
        if key == "stage":
            continue
        if key not in options:
            problems.append(f"{where}.{key}: {name} has no such option{suggestion(key, options)}")
        elif not _same_kind(value, options[key]):
            kind = type(options[key]).__name__
            problems.append(f"{where}.{key}: expected {kind}, found {value!r}")
    return problems


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a TOML value can stand for an option with this default."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(default))


def read_prompts(name_or_file: str) -> dict[str, list[tuple[str, int]]]:
    """Prompt/seed pairs of the three disjoint splits from a JSON file or the shipped list.

    Raises ProfileError when a split is missing or empty, or when splits overlap.
    """
    path = HERE / "prompts" / "general.json" if name_or_file == "default" else Path(name_or_file)
    where = f"prompts {path}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            split: [(str(prompt), int(seed)) for prompt, seed in data[split]]
            for split in ("calibration", "tuning", "evaluation")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(
            where,
            expected='JSON: {"calibration": [[prompt, seed], …], "tuning": …, "evaluation": …}',
            found=f"{type(error).__name__}: {error}",
            remedy="mend the file",
        ) from error
    _check_disjoint(where, splits)
    return splits


def _check_disjoint(where: str, splits: Mapping[str, list[tuple[str, int]]]) -> None:
    empty = [split for split, pairs in splits.items() if not pairs]
    splits_of: dict[tuple[str, int], set[str]] = {}
    for split, pairs in splits.items():
        for pair in pairs:
            splits_of.setdefault(pair, set()).add(split)
    shared = [f"{p} in {' and '.join(sorted(s))}" for p, s in splits_of.items() if len(s) > 1]
    if empty or shared:
        raise ProfileError(
            where,
            expected="three disjoint splits, none empty",
            found=f"empty: {empty or 'none'}; shared: {', '.join(shared) or 'none'}",
            remedy="move or remove these pairs",
        )
