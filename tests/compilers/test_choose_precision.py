"""The stage: a plan goes in, one that keeps the budget comes out, or an error that says what could
be had."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffoundry.compilers.choose_precision import ChoosePrecision
from diffoundry.compression.costs import count_multiply_adds
from diffoundry.compression.estimating import PlanSettings
from diffoundry.compression.sensitivity import Bench
from diffoundry.compression.statistics import feeds_of
from diffoundry.errors import ArtifactError, StageError
from diffoundry.formats import quant_plan, sensitivity
from diffoundry.formats.recording import load_component as load_recording
from tests.compilers.mini_component import MiniComponent
from tests.core.compression.recorded import plan_of
from tests.mini_pipelines import make_named


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    made = MiniComponent(make_named(tmp_path_factory.mktemp("mini"), "lcm"), folder, "text_encoder")
    calls = load_recording(made.inputs["calibration"].path).calls
    plan = plan_of(made.module, calls, PlanSettings(keep=()), made.contract)
    quant_plan.save(folder / "plan", plan)
    made.inputs["plan"] = made.artifact("quant_plan", folder / "plan")
    return made


def drift_of(mini, plan):
    calls = load_recording(mini.inputs["tuning"].path).calls
    return Bench(mini.module, mini.contract, calls).sqnr_db(plan)


def test_without_a_budget_the_plan_passes_and_its_drift_is_told(mini):
    made = mini.run(ChoosePrecision(), "none")
    table = sensitivity.load(made["table"])
    plan = quant_plan.load(mini.inputs["plan"].path)
    assert quant_plan.digest(made["plan"]) == quant_plan.digest(mini.inputs["plan"].path)
    assert table.rows == () and table.whole_db == pytest.approx(drift_of(mini, plan), abs=1e-3)


def test_a_budget_that_breaks_is_repaired_with_a_margin(mini):
    whole = drift_of(mini, quant_plan.load(mini.inputs["plan"].path))
    budget = whole + 2
    made = mini.run(ChoosePrecision(drift_budget_db=budget, max_float_share=0.9), "broken")
    table, plan = sensitivity.load(made["table"]), quant_plan.load(made["plan"])
    assert table.reverted and table.budget_db == budget
    assert table.reached_db >= budget + 0.5 - 1e-3
    assert drift_of(mini, plan) == pytest.approx(table.reached_db, abs=1e-3)
    for name in table.reverted:
        table_or_not = {"embedding": "float"}.get(plan.by_module[name].kind, "weight_only")
        assert plan.by_module[name].scheme == table_or_not
        assert "sensitivity" in plan.by_module[name].why
    assert len(table.rows) == len(plan.layers)


def test_a_budget_out_of_reach_fails_with_the_best_and_its_cost(mini):
    stage = ChoosePrecision(drift_budget_db=200.0, max_float_share=0.3)
    with pytest.raises(StageError) as caught:
        mini.run(stage, "never")
    text = caught.value.text()
    assert "200.5 dB" in text and "layers in float" in text and "of the work" in text
    assert not (mini.folder / "never" / "plan").exists()


def test_an_interrupted_run_goes_on_from_its_journal(mini):
    journal = mini.folder / "journal"
    stage = ChoosePrecision(measure="always")
    first = mini.run(stage, "first", journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:20])
    said: list[str] = []
    second = mini.run(stage, "second", journal=journal, say=said.append)
    assert any("3 of" in line and "measured before" in line for line in said)
    assert sensitivity.digest(first["table"]) == sensitivity.digest(second["table"])


def test_a_plan_of_another_model_is_refused_with_every_name(mini):
    plan = quant_plan.load(mini.inputs["plan"].path)
    layers = tuple(dataclasses.replace(one, module=f"x.{one.module}") for one in plan.layers[:3])
    tensors = {f"x.{name}": np.array(value) for name, value in plan.tensors.items()}
    quant_plan.save(mini.folder / "strange", dataclasses.replace(
        plan, layers=layers, tensors=tensors))  # fmt: skip
    before = mini.inputs["plan"]
    mini.inputs["plan"] = mini.artifact("quant_plan", mini.folder / "strange")
    try:
        with pytest.raises(ArtifactError) as caught:
            mini.run(ChoosePrecision(), "strangework")
    finally:
        mini.inputs["plan"] = before
    assert all(layer.module in caught.value.text() for layer in layers)


def test_an_empty_tuning_recording_is_refused(mini):
    before = mini.inputs["tuning"]
    mini.give_calls("empty", [])
    mini.inputs["tuning"] = mini.inputs["empty"]
    try:
        with pytest.raises(StageError, match="recorded tuning calls"):
            mini.run(ChoosePrecision(), "emptywork")
    finally:
        mini.inputs["tuning"] = before


@pytest.fixture
def counted(mini, monkeypatch):
    """How often each module call is made: the text encoder's last norm runs once in each."""
    calls = []
    plain = type(mini.module).forward

    def forward(self, *feeds):
        calls.append(1)
        return plain(self, *feeds)

    monkeypatch.setattr(type(mini.module), "forward", forward)
    return calls


def work_of(mini):
    call = load_recording(mini.inputs["tuning"].path).calls[0]
    return sum(count_multiply_adds(mini.module, feeds_of(mini.contract, call.feeds)).values())


@pytest.mark.parametrize("allowed", [40, 64])
def test_where_calls_are_dear_their_number_is_bounded(mini, counted, allowed):
    whole = drift_of(mini, quant_plan.load(mini.inputs["plan"].path))
    budget, most = whole + 1, allowed * work_of(mini)
    counted.clear()
    said: list[str] = []
    stage = ChoosePrecision(budget, max_float_share=0.9, max_multiply_adds=most)
    made = mini.run(stage, f"bounded{allowed}", say=said.append)
    assert len(counted) <= allowed
    table, plan = sensitivity.load(made["table"]), quant_plan.load(made["plan"])
    assert table.method == "own_output" and len(table.rows) == len(plan.layers)
    assert table.reverted and table.reached_db >= budget + 0.5 - 1e-3
    assert any("at most" in line and "ranked by their own outputs" in line for line in said)
    again = mini.run(stage, f"bounded{allowed}again")
    assert sensitivity.digest(made["table"]) == sensitivity.digest(again["table"])
    assert quant_plan.digest(made["plan"]) == quant_plan.digest(again["plan"])


def test_a_plan_that_holds_takes_one_pass(mini, counted):
    stage = ChoosePrecision(5.0, max_multiply_adds=40 * work_of(mini))
    counted.clear()
    mini.run(stage, "onepass")
    assert len(counted) <= 1 + 5
