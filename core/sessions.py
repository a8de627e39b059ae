"""Opens an artifact with a runtime and checks names, dtypes and shapes once, for every adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffoundry.errors import ArtifactError, ContractError, DeferredError, DiffoundryError
from diffoundry.memory import give_memory_back
from diffoundry.types import (
    Array,
    Artifact,
    Contract,
    HasStandIn,
    Runtime,
    Session,
    ShapePolicy,
    StandIn,
)


class CheckedSession:
    """A session whose feeds and outputs are held against the contract and the shape policy.

    `contract` is the engine's own, `component` the component's: feeds may have the dtypes of
    either. What the component takes is cast to what the engine takes (int64 ids to int32).
    """

    def __init__(
        self,
        session: Session,
        contract: Contract,
        policy: ShapePolicy | None = None,
        component: Contract | None = None,
    ) -> None:
        self._session = session
        self.contract = contract
        self.policy = policy or ShapePolicy()
        self._declared = {spec.name: spec.dtype for spec in (component or contract).inputs}

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ContractError where feeds or outputs do not fit."""
        feeds = self._fitted(feeds)
        shape = self._check(feeds)
        outputs = self._session.infer(feeds)
        self.contract.check_outputs(outputs, shape)
        return outputs

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        feeds = self._fitted(feeds)
        self._check(feeds)
        return self._session.probe(feeds, names)

    def precision_used(self) -> dict[str, Any]:
        return self._session.precision_used()

    def close(self) -> None:
        self._session.close()

    def _fitted(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        # Any other dtype stays what it is, and is refused.
        known = {n: a for n, a in feeds.items() if str(a.dtype) == self._declared.get(n)}
        return {**feeds, **fit_feeds(known, self.contract)}

    def _check(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        shape = self.contract.check_feeds(feeds)
        if not self.policy.allows(shape):
            allowed = "; ".join(
                ", ".join(f"{axis}={value}" for axis, value in one) for one in self.policy.shapes
            )
            raise ContractError(
                f"{self.contract.component}: this engine has {self.policy.kind} shapes",
                expected=allowed,
                found=", ".join(f"{axis}={value}" for axis, value in sorted(shape.items())),
                remedy="use one of these shapes, or build a variant with this one",
            )
        return shape


class SessionOnDemand:
    """A session that is opened at its first call, and after `pause` at the next one.

    Engines that are needed one after the other then need no memory together. `contract` and
    `policy` are known before it is open. What `opening` raises comes with the first call.
    """

    def __init__(
        self,
        opening: Callable[[], Session],
        contract: Contract,
        policy: ShapePolicy | None = None,
    ) -> None:
        self._opening = opening
        self.contract, self.policy = contract, policy or ShapePolicy()
        self._opened: Session | None = None

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, opening the engine where it is not. Raises what that and `infer` raise."""
        return self._session().infer(feeds)

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        return self._session().probe(feeds, names)

    def precision_used(self) -> dict[str, Any]:
        return self._session().precision_used()

    def open(self) -> None:
        """Open the engine now, where it is not. Raises what that raises."""
        self._session()

    def pause(self) -> None:
        """Free the engine until the next call."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
            give_memory_back()

    def close(self) -> None:
        self.pause()

    def _session(self) -> Session:
        if self._opened is None:
            self._opened = self._opening()
        return self._opened


def open_session(
    runtime: Runtime, artifact: Artifact, contract: Contract, device: str = "cpu", threads: int = 0
) -> CheckedSession:
    """Open `artifact` with `runtime`. `threads=0` leaves the number to the runtime.

    Raises ArtifactError when the runtime does not take this type or the file is damaged,
    MissingToolError or DeferredError when it cannot run here.
    """
    if not runtime.accepts(artifact.type):
        raise ArtifactError(
            f"{type(runtime).__name__} cannot open {artifact.path.name}",
            expected="an artifact type that this runtime takes",
            found=f"{artifact.type.kind} {artifact.type.precision or ''}".strip(),
            remedy="open it with the runtime that its variant names",
        )
    problem = runtime.unavailable(device)
    if problem is not None:
        raise problem
    own = artifact.contract or contract
    session = runtime.open(artifact, own, device, threads)
    return CheckedSession(session, own, artifact.type.shape_policy, contract)


def fit_feeds(feeds: Mapping[str, Array], contract: Contract) -> dict[str, Array]:
    """`feeds` in the dtypes that an engine's contract declares (int64 → int32, float32 → float16).

    Raises ContractError where they are of another kind, or where a value does not fit.
    """
    dtypes = {spec.name: spec.dtype for spec in contract.inputs}
    return {name: _cast(name, array, dtypes.get(name)) for name, array in feeds.items()}


def _cast(name: str, array: Array, dtype: str | None) -> Array:
    """`array` as `dtype` where both are integers that hold the values, or both floats."""
    import numpy as np

    if dtype is None or str(array.dtype) == dtype:
        return array
    target = np.dtype(dtype)
    if target.kind == array.dtype.kind == "f":
        return array.astype(target)
    if target.kind in "iu" and array.dtype.kind in "iu":
        limits = np.iinfo(target)
        if not array.size or (limits.min <= array.min() and array.max() <= limits.max):
            return array.astype(target)
    raise ContractError(
        f"input {name!r}",
        expected=f"values that fit the engine's {dtype}",
        found=str(array.dtype),
        remedy="the engine's contract and these values do not belong together",
    )


@dataclass(frozen=True)
class Opening:
    """How an artifact is opened on this host: by its own runtime, or by a stand-in for it.

    `native` is the name of its own runtime. `deferred` is why that one cannot run here, set
    exactly where `stand_in` is. `problem` is what `open` raises where neither can.
    """

    native: str
    runtime: Runtime
    artifact: Artifact
    contract: Contract
    device: str = "cpu"
    threads: int = 0
    stand_in: StandIn | None = None
    deferred: DeferredError | None = None
    problem: DiffoundryError | None = None

    def open(self) -> CheckedSession:
        """Open it. Raises what `open_session` raises."""
        if self.problem is not None:
            raise self.problem
        return open_session(self.runtime, self.artifact, self.contract, self.device, self.threads)


def choose_opening(
    runtime_named: Callable[[str], Runtime],
    native: str,
    artifact: Artifact,
    contract: Contract,
    device: str = "cpu",
    threads: int = 0,
) -> Opening:
    """The runtime `native` where it can run here, else its stand-in for `artifact`.

    A stand-in is asked for only where the runtime is deferred: a package that is missing stays
    missing. Where the stand-in cannot run either, opening raises DeferredError: not a pass.
    """
    runtime = runtime_named(native)
    opening = Opening(native, runtime, artifact, contract, device, threads)
    deferred = runtime.unavailable(device)
    askable = isinstance(runtime, HasStandIn) and runtime.accepts(artifact.type)
    if not isinstance(deferred, DeferredError) or not askable:
        return opening
    assert isinstance(runtime, HasStandIn)
    try:
        found = runtime.stand_in(artifact)
    except DiffoundryError as error:
        return dataclasses.replace(opening, problem=error)
    if found is None:
        return opening
    try:
        other = runtime_named(found.runtime)
        lacking = other.unavailable(found.device)
    except DiffoundryError as error:
        lacking = error
    if lacking is not None:
        return dataclasses.replace(opening, problem=_neither(deferred, found, lacking))
    opened = dataclasses.replace(
        found.artifact,
        # The shapes that the engine promises are held to, whatever else a stand-in could run.
        type=dataclasses.replace(found.artifact.type, shape_policy=artifact.type.shape_policy),
        contract=found.artifact.contract or artifact.contract,
    )
    return Opening(
        native, other, opened, contract, found.device, threads, stand_in=found, deferred=deferred
    )


def _neither(deferred: DeferredError, stand_in: StandIn, lacking: Exception) -> DeferredError:
    """Why neither the runtime nor its stand-in runs here."""
    reason, remedy = str(lacking).splitlines()[0], ""
    if isinstance(lacking, DiffoundryError):
        reason = ": ".join(part for part in (lacking.where, lacking.found) if part)
        remedy = f"; or, to check it by {stand_in.runtime}: {lacking.remedy}"
    return DeferredError(
        deferred.where,
        expected=deferred.expected,
        found=f"{deferred.found}, and its stand-in {stand_in.runtime} cannot run here ({reason})",
        remedy=deferred.remedy + (remedy if getattr(lacking, "remedy", "") else ""),
    )
