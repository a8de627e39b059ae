"""Opens an artifact with a runtime and checks names, dtypes and shapes once, for every adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffoundry.errors import ArtifactError, ContractError
from diffoundry.types import Array, Artifact, Contract, Runtime, Session, ShapePolicy


class CheckedSession:
    """A session whose feeds and outputs are held against the contract and the shape policy."""

    def __init__(
        self, session: Session, contract: Contract, policy: ShapePolicy | None = None
    ) -> None:
        self._session = session
        self.contract = contract
        self.policy = policy or ShapePolicy()

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ContractError where feeds or outputs do not fit."""
        shape = self._check(feeds)
        outputs = self._session.infer(feeds)
        self.contract.check_outputs(outputs, shape)
        return outputs

    def probe(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        self._check(feeds)
        return self._session.probe(feeds, names)

    def precision_used(self) -> dict[str, Any]:
        return self._session.precision_used()

    def close(self) -> None:
        self._session.close()

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


def open_session(
    runtime: Runtime, artifact: Artifact, contract: Contract, device: str = "cpu", threads: int = 0
) -> CheckedSession:
    """Open `artifact` with `runtime`. `threads=0` leaves the number to the runtime.

    Raises MissingToolError or DeferredError when the runtime cannot run here, ArtifactError
    when it does not take this type or the file is damaged.
    """
    problem = runtime.unavailable(device)
    if problem is not None:
        raise problem
    if not runtime.accepts(artifact.type):
        raise ArtifactError(
            f"{type(runtime).__name__} cannot open {artifact.path.name}",
            expected="an artifact type that this runtime takes",
            found=f"{artifact.type.kind} {artifact.type.precision or ''}".strip(),
            remedy="open it with the runtime that its variant names",
        )
    contract = artifact.contract or contract
    session = runtime.open(artifact, contract, device, threads)
    return CheckedSession(session, contract, artifact.type.shape_policy)
