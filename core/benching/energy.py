"""Reads the energy counters that a host exposes: RAPL for the processor, NVML for NVIDIA GPUs.

They count what the whole package or card uses, whoever causes it: bench on an idle machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
NOT_EXPOSED = "not exposed on this host"


class Meter(Protocol):
    """A counter of joules that only grows."""

    @property
    def name(self) -> str: ...

    def joules(self) -> float: ...


@dataclass
class Rapl:
    """Processor packages through Linux' powercap, whose counters wrap around."""

    zones: Sequence[Path]
    name: str = "RAPL"
    _total: float = 0.0
    _last: dict[Path, int] = field(default_factory=dict)

    def joules(self) -> float:
        for zone in self.zones:
            now = int((zone / "energy_uj").read_text())
            moved = now - self._last.get(zone, now)
            if moved < 0:
                moved += int((zone / "max_energy_range_uj").read_text())
            self._total += moved / 1e6
            self._last[zone] = now
        return self._total


@dataclass
class Nvml:
    """Every NVIDIA GPU, through nvidia-ml-py."""

    nvml: Any
    handles: Sequence[Any]
    name: str = "NVML"

    def joules(self) -> float:
        used = (self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self.handles)
        return sum(used) / 1e3


@dataclass
class Sum:
    """Several meters as one."""

    parts: Sequence[Meter]

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    def joules(self) -> float:
        return sum(part.joules() for part in self.parts)


def find_meter(powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """The host's meter and its name; or None and why there is none."""
    rapl, why = _rapl(powercap)
    nvml = _nvml()
    parts: list[Meter] = [part for part in (rapl, nvml) if part is not None]
    if not parts:
        return None, why
    found = Sum(parts)
    return found, found.name


def _rapl(powercap: Path) -> tuple[Rapl | None, str]:
    zones = []
    for counter in sorted(powercap.glob("*/energy_uj")):
        try:
            if not (counter.parent / "name").read_text().startswith("package"):
                continue  # cores and memory are parts of a package, or another sum of it
            int(counter.read_text())
        except PermissionError:
            return None, f"{NOT_EXPOSED}: RAPL is there, but only root may read {counter}"
        except (OSError, ValueError):
            continue
        zones.append(counter.parent)
    return (Rapl(zones), "RAPL") if zones else (None, NOT_EXPOSED)


def _nvml() -> Nvml | None:
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        meter = Nvml(pynvml, handles)
        meter.joules()
    except pynvml.NVMLError:
        return None
    return meter if handles else None
