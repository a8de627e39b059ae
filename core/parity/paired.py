"""Compares two series of right and wrong answers to the same questions, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffoundry.errors import ContractError, MissingToolError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Accuracies, discordant pairs, and how large the drop may still be.

    `only_reference`: pairs that only the reference got right; `only_engine`: the other way round.
    `mcnemar_p`: exact two-sided p-value of McNemar's test that neither is better.
    `drop_bound_95`: the accuracy drop lies below it with 95 % confidence.
    """

    pairs: int
    reference_accuracy: float
    engine_accuracy: float
    only_reference: int
    only_engine: int
    mcnemar_p: float
    drop_bound_95: float


def compare_paired(reference: Sequence[bool], engine: Sequence[bool]) -> Paired:
    """Compare answer by answer. Raises ContractError where there is none or their number differs.

    Sources: McNemar 1947 (exact, binomial); Clopper & Pearson 1934. The drop is the share of
    pairs that only the reference got right less the share that only the engine did; its bound
    takes Clopper-Pearson's upper bound of the first and lower bound of the second, at 97.5 %
    each (Bonferroni: together at least 95 %). Raises MissingToolError without scipy.
    """
    if not reference or len(reference) != len(engine):
        raise ContractError(
            "paired comparison",
            expected="the same number of answers, at least one",
            found=f"{len(reference)} and {len(engine)}",
        )
    count = len(reference)
    worse = sum(r and not e for r, e in zip(reference, engine, strict=True))
    better = sum(e and not r for r, e in zip(reference, engine, strict=True))
    return Paired(
        pairs=count,
        reference_accuracy=sum(reference) / count,
        engine_accuracy=sum(engine) / count,
        only_reference=worse,
        only_engine=better,
        mcnemar_p=mcnemar_p(worse, better),
        drop_bound_95=upper_bound(worse, count) - lower_bound(better, count),
    )


def mcnemar_p(worse: int, better: int) -> float:
    """Exact two-sided p-value: 1 where no pair is discordant."""
    if worse + better == 0:
        return 1.0
    stats = _stats()
    return float(stats.binomtest(min(worse, better), worse + better, 0.5).pvalue)


def upper_bound(hits: int, count: int) -> float:
    """Clopper-Pearson's upper bound, one-sided at 97.5 %, of the share `hits` / `count`."""
    alpha = (1 - CONFIDENCE) / 2
    return 1.0 if hits == count else float(_stats().beta.ppf(1 - alpha, hits + 1, count - hits))


def lower_bound(hits: int, count: int) -> float:
    """Clopper-Pearson's lower bound, one-sided at 97.5 %."""
    alpha = (1 - CONFIDENCE) / 2
    return 0.0 if hits == 0 else float(_stats().beta.ppf(alpha, hits, count - hits + 1))


def _stats() -> Any:
    try:
        from scipy import stats  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingToolError(
            "bounds of the prompt accuracy",
            expected="the package scipy (scikit-image brings it)",
            found=str(error),
            remedy="pip install scipy",
        ) from error
    return stats
