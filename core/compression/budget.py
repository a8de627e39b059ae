"""Which layers go back to float so that a drift budget holds: a knapsack, then greedy repair.

Noise of single layers adds up nearly as powers, so what is left after taking layers out can be
foretold from the sensitivity table; the whole is measured again after every step all the same.
Where a measurement is dear, `fit_within` halves a ranking instead, and counts what it measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Scheme
from diffoundry.formats.sensitivity import Row

SSIM_WEIGHT = 1.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Fitted:
    """A plan that keeps its budget, what it reaches, and the layers that went back to float."""

    plan: QuantPlan
    reached_db: float
    reverted: tuple[str, ...]


def fit(
    plan: QuantPlan,
    rows: Sequence[Row],
    budget_db: float,
    max_float_share: float,
    measure: Callable[[QuantPlan], float],
    say: Say = lambda line: None,
) -> Fitted:
    """Take layers out of the integer kernels until `measure` (SQNR in dB) reaches `budget_db`.

    The next to go is the one that takes most noise with it for its cost; first as many as the
    knapsack foretells, then one by one. Their weights stay INT8, unless the layer was weight-only
    already and still hurts: then it becomes float. Raises StageError, with what was reached and
    what it cost, where only layers are left that would put more than `max_float_share` of the cost
    in float.
    """
    total = sum(row.cost for row in rows) or 1.0
    queue = sorted(rows, key=_gain, reverse=True)
    reverted: list[str] = []
    spent, reached = 0.0, measure(plan)
    count = _foretold(queue, budget_db)
    while reached < budget_db:
        take: list[Row] = []
        for row in list(queue):
            price = row.cost if row.scheme in ("static", "dynamic") else 0.0
            if len(take) < max(count, 1) and spent + price <= max_float_share * total:
                take.append(row)
                queue.remove(row)
                spent += price
        if not take:
            raise _out_of_reach(
                plan, budget_db, max_float_share, reached, len(reverted), spent / total
            )
        count = 1
        plan = without(plan, [row.module for row in take], f"budget of {budget_db:g} dB")
        reverted += [row.module for row in take]
        reached = measure(plan)
        say(f"{plan.component}: {reached:.2f} dB with {len(reverted)} layers in float")
    return Fitted(plan, reached, tuple(reverted))


def fit_within(
    plan: QuantPlan,
    rows: Sequence[Row],
    budget_db: float,
    max_float_share: float,
    measure: Callable[[QuantPlan], float],
    most: int,
    say: Say = lambda line: None,
) -> Fitted:
    """The same with at most `most` measurements, of a plan that is known to break the budget.

    The layers stand in a row, most noise for its cost first; how many of them must go is found by
    halving, and then groups of them come back from the quiet end while the budget still holds.
    Raises StageError where all that `max_float_share` allows is not enough.
    """
    total = sum(row.cost for row in rows) or 1.0
    queue, spent = _that_may_go(rows, max_float_share * total)
    used = 0

    def holds(names: Sequence[str]) -> float | None:
        nonlocal used
        used += 1
        reached = measure(without(plan, names, f"budget of {budget_db:g} dB"))
        say(f"{plan.component}: {reached:.2f} dB with {len(names)} layers in float "
            f"(measurement {used} of at most {most})")  # fmt: skip
        best.append(reached)
        return reached if reached >= budget_db else None

    best: list[float] = []
    reached = holds(queue)
    if reached is None:
        raise _out_of_reach(plan, budget_db, max_float_share, best[0], len(queue), spent / total)
    low, high = 0, len(queue)
    while high - low > 1 and used < most:
        middle = (low + high) // 2
        found = holds(queue[:middle])
        low, high, reached = (low, middle, found) if found is not None else (middle, high, reached)
    kept = queue[:high]
    for group in _groups(kept, most - used):
        fewer = [name for name in kept if name not in group]
        found = holds(fewer)
        if found is not None:
            kept, reached = fewer, found
    return Fitted(without(plan, kept, f"budget of {budget_db:g} dB"), reached, tuple(kept))


def _that_may_go(rows: Sequence[Row], most: float) -> tuple[list[str], float]:
    """The layers that may become float together, most noise for its cost first, and their cost."""
    names, spent = [], 0.0
    for row in sorted(rows, key=_gain, reverse=True):
        price = row.cost if row.scheme in ("static", "dynamic") else 0.0
        if spent + price <= most:
            names.append(row.module)
            spent += price
    return names, spent


def _groups(names: Sequence[str], count: int) -> list[list[str]]:
    """At most `count` groups of neighbours, from the last to the first."""
    size = max(1, -(-len(names) // max(1, count)))
    groups = [list(names[start : start + size]) for start in range(0, len(names), size)]
    # The first group is what must go if anything must.
    return groups[:0:-1] if count > 0 else []


def _out_of_reach(
    plan: QuantPlan, budget_db: float, max_share: float, reached: float, layers: int, share: float
) -> StageError:
    return StageError(
        f"choose_precision: {plan.component}",
        expected=f"a drift of at least {budget_db:g} dB SQNR with at most "
        f"{max_share:.0%} of the work in float",
        found=f"{reached:.4g} dB with {layers} layers in float ({share:.0%} of the work)",
        remedy="allow more drift (--drift-budget, [limits.drift]), or more float (max_float_share)",
    )


def without(plan: QuantPlan, names: Sequence[str], why: str) -> QuantPlan:
    """The plan with these layers one step nearer to float."""
    layers = [_step_back(one, why) if one.module in names else one for one in plan.layers]
    return dataclasses.replace(plan, layers=tuple(layers))


def _step_back(layer: LayerPlan, why: str) -> LayerPlan:
    scheme: Scheme = "weight_only" if layer.integer_kernel else "float"
    return dataclasses.replace(
        layer, scheme=scheme, activation=None, output=None, why=f"sensitivity: {why}"
    )


def _noise(row: Row) -> float:
    """Relative noise power, counted double where the structure suffers as much as it can."""
    return float(10 ** (-row.sqnr_db / 10)) * (1.0 + SSIM_WEIGHT * (1.0 - row.ssim))


def _gain(row: Row) -> float:
    return _noise(row) / max(row.cost, 1e-12)


def _foretold(queue: Sequence[Row], budget_db: float) -> int:
    """How many of the queue must go for the noise of the rest to keep the budget."""
    left = sum(10 ** (-row.sqnr_db / 10) for row in queue)
    allowed = 10 ** (-budget_db / 10)
    for count, row in enumerate(queue):
        if left <= allowed:
            return count
        left -= 10 ** (-row.sqnr_db / 10)
    return len(queue)
