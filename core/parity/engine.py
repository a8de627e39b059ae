"""Runs one engine on recorded feeds: each feed once, and an error is an answer, not a crash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffoundry.errors import DiffoundryError, MissingToolError
from diffoundry.sessions import fit_feeds
from diffoundry.types import Array, Contract, Session


@dataclass(frozen=True)
class Run:
    """What came of one call: `outputs`, or the `error` (its message kept).

    `refused` is True where the error is one of Diffoundry's own, which say what was expected.
    """

    outputs: Mapping[str, Array] | None
    error: str = ""
    refused: bool = False


class Engine:
    """A session with its contract; runs are kept, so that checks may share them.

    Feeds are cast to the contract's own dtypes (int64 → int32, float32 → float16) where the
    engine's format differs from the recording's. Outputs are held against the contract here
    too: a session that was not opened centrally must not pass with a missing output.
    """

    def __init__(self, session: Session, contract: Contract) -> None:
        self.session = session
        self.contract = contract
        self._runs: dict[int, tuple[Mapping[str, Array], Run]] = {}

    def run(self, feeds: Mapping[str, Array]) -> Run:
        """The outputs for `feeds` (the same mapping object is run only once)."""
        if id(feeds) not in self._runs:
            # The feeds are kept beside the run: a freed mapping's id could come again.
            self._runs[id(feeds)] = (feeds, self._attempt(feeds))
        return self._runs[id(feeds)][1]

    def probe(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every intermediate value in execution order. Raises ContractError where impossible."""
        return self.session.probe(self.fitted(feeds))

    def fitted(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """`feeds` in the dtypes that the engine's contract declares."""
        return fit_feeds(feeds, self.contract)

    def _attempt(self, feeds: Mapping[str, Array]) -> Run:
        try:
            fitted = self.fitted(feeds)
            outputs = dict(self.session.infer(fitted))
            self.contract.check_outputs(outputs, self.contract.check_feeds(fitted))
        except MissingToolError:
            raise
        except DiffoundryError as error:
            return Run(None, error.text(), refused=True)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its answer
            return Run(None, f"{type(error).__name__}: {error}")
        # Copies: a runtime may hand out its own buffers and fill them again at the next call.
        return Run({name: np.array(value) for name, value in outputs.items()})
