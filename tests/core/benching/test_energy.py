"""Energy counters: whole packages only, wrap-around, and why there are none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffoundry.benching.energy import NOT_EXPOSED, find_meter


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def zone(powercap: Path, folder: str, name: str, microjoules: str) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(microjoules)
    (path / "max_energy_range_uj").write_text("1000000000")
    return path


def test_a_host_without_counters_says_so(tmp_path: Path) -> None:
    assert find_meter(tmp_path) == (None, NOT_EXPOSED)


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    zones = [
        zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", "1000000") for number in (0, 1)
    ]
    zone(tmp_path, "intel-rapl:0:0", "core", "5")
    meter, name = find_meter(tmp_path)
    assert meter is not None and name == "RAPL"
    before = meter.joules()
    for path in zones:
        (path / "energy_uj").write_text("3000000")
    assert meter.joules() - before == pytest.approx(4.0)


def test_a_counter_that_wrapped_around_goes_on(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", "999000000")
    meter, _ = find_meter(tmp_path)
    assert meter is not None
    before = meter.joules()
    (path / "energy_uj").write_text("1000000")
    assert meter.joules() - before == pytest.approx(2.0)


def test_a_counter_that_only_root_may_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", "1")
    real = Path.read_text

    def read(self: Path, *args: object, **more: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", read)
    meter, why = find_meter(tmp_path)
    assert meter is None and why.startswith(NOT_EXPOSED) and "root" in why


def test_gpus_are_read_through_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, name = find_meter(tmp_path)
    assert meter is not None and name == "NVML" and meter.joules() == 3.0


def test_a_driver_that_does_not_count_energy_is_no_meter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("not supported")

    monkeypatch.setitem(
        sys.modules, "pynvml", SimpleNamespace(NVMLError=RuntimeError, nvmlInit=refuse)
    )
    assert find_meter(tmp_path) == (None, NOT_EXPOSED)
