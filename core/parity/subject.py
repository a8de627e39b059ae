"""What a component's checks judge, and the guard that lets none of them pass by crashing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from diffoundry.errors import (
    ArtifactError,
    DeferredError,
    DiffoundryError,
    MissingToolError,
    ModelError,
)
from diffoundry.formats.quant_plan import LayerPlan
from diffoundry.formats.recording import Call, ComponentRecording, Floor, ShapeCall
from diffoundry.formats.simulation import Simulation
from diffoundry.parity.engine import Engine
from diffoundry.parity.limits import LOSSLESS
from diffoundry.types import Array, CheckResult, Limits, Precision, ShapePolicy

_ROUNDED: Mapping[str, str] = {"int8": "fp16", "int8_bf16": "bf16"}


@dataclass(frozen=True)
class Subject:
    """One engine beside the recording of its original.

    `fp32_engine` is the fp32 artifact of the same export: effects too small to be seen at
    fp16 are proven on it. `proven_at_build`: where there is none, the build had one and would not
    have published without that proof (`verify` of a bundle that holds no fp32 variant).
    `simulation`, of a variant that is lossy on purpose: what the compressed component computes in
    PyTorch; conversion is judged against it, and drift from the original has `drift_limits`.
    `planned`, of an INT8 engine: the layers of its quantization plan; `stored`: which layers are
    INT8 in its file (qualified name -> scheme).
    """

    engine: Engine
    recording: ComponentRecording
    precision: Precision = "fp32"
    policy: ShapePolicy = field(default_factory=ShapePolicy)
    limits: Limits = LOSSLESS
    fp32_engine: Engine | None = None
    proven_at_build: bool = False
    simulation: Simulation | None = None
    drift_limits: Limits | None = None
    planned: tuple[LayerPlan, ...] | None = None
    stored: Mapping[str, str] | None = None

    @property
    def component(self) -> str:
        return self.recording.contract.component

    def simulated(self, call: Call) -> Mapping[str, Array] | None:
        """What the compressed component computes in `call`, one of the recording's; None for a
        variant that is not lossy on purpose."""
        if self.simulation is None:
            return None
        for mine, theirs in (
            (self.recording.calls, self.simulation.calls),
            (self.recording.shape_calls, self.simulation.shape_calls),
        ):
            for one, outputs in zip(mine, theirs, strict=True):
                if one is call:
                    return outputs
        raise ArtifactError(
            f"simulation of {self.component}", expected="the recording's calls", found="another",
            remedy="run the build again",
        )  # fmt: skip

    def noise(self) -> Mapping[str, float]:
        """Output -> root mean square of what the compression itself changes, over all calls."""
        found = {}
        for spec in self.recording.contract.outputs:
            squares = [
                np.square(np.subtract(outputs[spec.name], call.outputs[spec.name], dtype="f8"))
                for call in self.recording.calls
                if (outputs := self.simulated(call)) is not None
            ]
            found[spec.name] = float(np.sqrt(np.mean([s.mean() for s in squares] or [0.0])))
        return found

    def floor_of(self, call: Call, output: str) -> float:
        """The floor (max_abs) of one output in one call: a call at a shape of its own may have
        been measured itself, and the larger figure counts."""
        floors = [self.floors()[output].max_abs]
        if isinstance(call, ShapeCall):
            own = call.floors.get(self.precision, {})
            floors += [own[output].max_abs] if output in own else []
        return max(floors)

    def floors(self, precision: Precision | None = None) -> Mapping[str, Floor]:
        """Output -> floor at the engine's precision.

        An INT8 engine has those of what its other layers are held to (fp16, bf16): rounding alone,
        not quantization noise. Raises ArtifactError for a recording without that floor.
        """
        wanted = precision or self.precision
        found = self.recording.floors.get(_ROUNDED.get(wanted, wanted))
        names = [spec.name for spec in self.recording.contract.outputs]
        if not found or any(name not in found for name in names):
            raise ArtifactError(
                f"recording of {self.component}",
                expected=f"a floor at {wanted} for {', '.join(names)}",
                found=", ".join(self.recording.floors) or "no floors",
                remedy="run capture again",
            )
        return found


Check = Callable[[], tuple[CheckResult, ...]]


def guarded(level: str, component: str | None, check: Check) -> tuple[CheckResult, ...]:
    """Run one check; whatever goes wrong in it becomes a line that is not a pass.

    DeferredError → "deferred" with its reason; any other error, or no line at all → "failed".
    A missing tool (exit 3) and a model at fault (exit 2) are raised: no engine is to blame.
    """

    def line(status: Literal["failed", "deferred"], message: str) -> tuple[CheckResult, ...]:
        return (CheckResult(level, level, status, component, message=message),)

    try:
        results = check()
    except (MissingToolError, ModelError):
        raise
    except DeferredError as error:
        return line("deferred", error.text())
    except DiffoundryError as error:
        return line("failed", f"the check could not run: {error.text()}")
    except Exception as error:  # noqa: BLE001 - a check that crashes is not a pass
        return line("failed", f"the check could not run: {type(error).__name__}: {error}")
    return results or line("failed", "the check judged nothing")
