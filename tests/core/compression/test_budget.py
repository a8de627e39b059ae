"""Back to float until the budget holds, cheapest first."""

from __future__ import annotations

import math

import pytest

from diffoundry.compression.budget import fit, fit_within, without
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


class Counting:
    """`measure`, and how often it was asked."""

    def __init__(self, layers=0):
        self.times, self.layers = 0, layers

    def __call__(self, plan):
        self.times += 1
        if not self.layers:
            return measure(plan)
        # Every layer brings the same noise, and the first half is all that matters.
        loud = sum(one.integer_kernel for one in plan.layers[: self.layers // 2])
        return 30.0 - 0.01 * loud


def test_within_a_bound_the_same_layer_goes():
    counted = Counting()
    fitted = fit_within(PLAN, ROWS, 30.5, 0.5, counted, 8)
    assert "loud" in fitted.reverted and "dear" not in fitted.reverted
    assert fitted.reached_db == pytest.approx(measure(fitted.plan)) and fitted.reached_db >= 30.5
    assert counted.times <= 8


@pytest.mark.parametrize("most", [5, 12, 16])
def test_three_hundred_layers_take_no_more_measurements_than_allowed(most):
    rows = tuple(Row(f"l{i}", "static", 30 + i / 100, 1.0, 1.0) for i in range(300))
    layers = tuple(LayerPlan(row.module, "linear", "static", activation=Range(-1, 1))
                   for row in rows)  # fmt: skip
    plan, counted = QuantPlan("unet", "by hand", {}, layers), Counting(300)
    fitted = fit_within(plan, rows, 29.0, 0.9, counted, most)
    assert counted.times <= most
    assert fitted.reached_db >= 29.0 == pytest.approx(29.0)
    # Fifty of the first half must go; halving finds how many from the front of the row.
    assert 50 <= len(fitted.reverted) <= {5: 80, 12: 51, 16: 51}[most]


def test_groups_that_need_not_go_come_back():
    """The ranking is wrong about all but the last of a row."""
    rows = tuple(Row(f"l{i}", "static", 10 + i, 1.0, 1.0) for i in range(16))
    layers = tuple(LayerPlan(row.module, "linear", "static", activation=Range(-1, 1))
                   for row in rows)  # fmt: skip
    guilty = {"l0", "l11"}

    def measured(plan):
        return 20.0 if any(plan.by_module[name].integer_kernel for name in guilty) else 40.0

    fitted = fit_within(QuantPlan("unet", "", {}, layers), rows, 30.0, 1.0, measured, 12)
    assert guilty <= set(fitted.reverted) and len(fitted.reverted) <= 6
    assert fitted.reached_db == 40.0


def test_within_a_bound_what_is_out_of_reach_is_said_after_one_measurement():
    counted = Counting()
    with pytest.raises(StageError) as caught:
        fit_within(PLAN, ROWS, 60.0, 0.1, counted, 8)
    assert "3 layers in float" in caught.value.text() and "2% of the work" in caught.value.text()
    assert counted.times == 1
