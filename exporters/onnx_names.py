"""Names that no node of an ONNX graph has yet."""

from __future__ import annotations

from collections.abc import Iterable


class FreeNames:
    """Gives out names, each once: "a", "a_1", "a_2"."""

    def __init__(self, taken: Iterable[str | None]) -> None:
        self._taken = set(taken)

    def take(self, base: str) -> str:
        """`base`, with a number behind it where that is taken."""
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name
