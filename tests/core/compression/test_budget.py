"""Back to float until the budget holds, cheapest first."""

from __future__ import annotations

import math

import pytest

from diffoundry.compression.budget import fit, without
from diffoundry.errors import StageError
from diffoundry.formats.quant_plan import LayerPlan, QuantPlan, Range
from diffoundry.formats.sensitivity import Row

NOISE = {"loud": 1e-3, "dear": 8e-4, "quiet": 1e-5, "table": 2e-5}
COST = {"loud": 10.0, "dear": 1000.0, "quiet": 10.0, "table": 0.0}
ROWS = tuple(
    Row(
        name,
        "weight_only" if name == "table" else "static",
        -10 * math.log10(noise),
        1.0,
        COST[name],
    )
    for name, noise in NOISE.items()
)
PLAN = QuantPlan(
    "unet",
    "by hand",
    {},
    tuple(
        LayerPlan(row.module, "linear", row.scheme, activation=Range(-1, 1))
        if row.scheme == "static"
        else LayerPlan(row.module, "embedding", "weight_only")
        for row in ROWS
    ),
)


def measure(plan: QuantPlan) -> float:
    """Noise adds up; INT8 weights alone leave a hundredth of it."""
    total = 1e-12
    for layer in plan.layers:
        whole = layer.integer_kernel or (layer.module == "table" and layer.integer_weight)
        total += NOISE[layer.module] * (1 if whole else 0.01 * layer.integer_weight)
    return -10 * math.log10(total)


def test_a_budget_that_holds_takes_nothing_out():
    fitted = fit(PLAN, ROWS, 20.0, 0.5, measure)
    assert fitted.plan is PLAN and fitted.reverted == ()
    assert fitted.reached_db == pytest.approx(measure(PLAN))


def test_the_one_with_most_noise_for_its_cost_goes_first():
    fitted = fit(PLAN, ROWS, 30.5, 0.5, measure)
    assert "loud" in fitted.reverted and "dear" not in fitted.reverted
    assert fitted.reached_db == pytest.approx(measure(fitted.plan)) and fitted.reached_db >= 30.5
    back = fitted.plan.by_module["loud"]
    assert back.scheme == "weight_only" and back.activation is None and "budget" in back.why


def test_a_table_whose_weights_hurt_becomes_float():
    fitted = fit(PLAN, ROWS, 30.5, 0.5, measure)
    assert fitted.plan.by_module["table"].scheme == "float"


def test_a_budget_out_of_reach_says_what_was_reached_and_what_it_cost():
    with pytest.raises(StageError) as caught:
        fit(PLAN, ROWS, 60.0, 0.1, measure)
    text = caught.value.text()
    best = measure(without(PLAN, ["loud", "quiet", "table"], ""))
    assert "60 dB" in text and f"{best:.4g} dB with 3 layers in float" in text
    assert "2% of the work" in text and "max_float_share" in text


def test_no_more_of_the_cost_goes_to_float_than_allowed():
    with pytest.raises(StageError):
        fit(PLAN, ROWS, 35.0, 0.5, measure)
    fitted = fit(PLAN, ROWS, 35.0, 1.0, measure)
    assert "dear" in fitted.reverted and fitted.reached_db >= 35


def test_structure_lost_counts_too():
    rows = (Row("loud", "static", 31.0, 0.2, 10.0), Row("quiet", "static", 30.5, 1.0, 10.0))
    plan = without(PLAN, ["dear", "table"], "x")

    def measured(plan):
        return 20.0 if plan.by_module["loud"].integer_kernel else 40.0

    assert fit(plan, rows, 30.0, 1.0, measured).reverted[0] == "loud"
