"""A stage whose tool is not installed anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tests.core.building.fake_stages.upper import Upper


@dataclass(frozen=True)
class NeedsMissingTool(Upper):
    tools: ClassVar[tuple[str, ...]] = ("no-such-distribution",)
    extra: ClassVar[str] = "imaginary"
