"""One layer at a time, resumable."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from diffoundry.compression.sensitivity import Bench, measure_layers, rank_layers, similarity
from diffoundry.formats.quant_plan import Range
from diffoundry.formats.sensitivity import Row
from tests.compilers.small_network import CONTRACT
from tests.core.compression.recorded import shared, state_of


@pytest.fixture(scope="module")
def bench():
    network, calls, _ = shared()
    return Bench(network, CONTRACT, calls[:2])


class Counting(Bench):
    """Stops, like a killed process, before the `limit`-th row."""

    def __init__(self, limit=99):
        network, calls, _ = shared()
        super().__init__(network, CONTRACT, calls[:2])
        self.limit, self.made = limit, []

    def row(self, plan, layer, cost):
        if len(self.made) == self.limit:
            raise KeyboardInterrupt
        self.made.append(layer.module)
        return super().row(plan, layer, cost)


def say(_):
    pass


def test_each_row_is_what_the_layer_does_alone(bench):
    _, _, plan = shared()
    rows = measure_layers(bench, plan, "multiply_adds", None, say)
    assert [row.module for row in rows] == [one.module for one in plan.layers]
    alone = dataclasses.replace(plan, layers=(plan.by_module["block.conv"],))
    (row,) = (row for row in rows if row.module == "block.conv")
    assert row.sqnr_db == pytest.approx(bench.sqnr_db(alone), abs=1e-3)
    assert row.sqnr_db > bench.sqnr_db(plan)
    assert 0.9 < row.ssim < 1 and row.scheme == "static"
    assert row.cost == 8 * 8 * 9 * 16 / 16 * 16  # out × in × kernel × 4×4 positions


def test_layers_left_in_float_have_no_row(bench):
    _, _, plan = shared()
    layers = [dataclasses.replace(one, scheme="float") if one.module == "time" else one
              for one in plan.layers]  # fmt: skip
    rows = measure_layers(bench, dataclasses.replace(plan, layers=tuple(layers)),
                          "multiply_adds", None, say)  # fmt: skip
    assert "time" not in {row.module for row in rows} and len(rows) == 4


def test_an_interrupted_run_resumes_and_measures_nothing_twice(tmp_path):
    _, _, plan = shared()
    journal, lines = tmp_path / "journal", []
    first = Counting(limit=2)
    with pytest.raises(KeyboardInterrupt):
        measure_layers(first, plan, "multiply_adds", journal, say)
    second = Counting()
    rows = measure_layers(second, plan, "multiply_adds", journal, lines.append)
    names = [one.module for one in plan.layers]
    assert first.made + second.made == names and [row.module for row in rows] == names
    assert rows == measure_layers(Counting(), plan, "multiply_adds", None, say)
    assert any("2 of 5 layers were measured before" in line for line in lines)


def test_a_line_that_was_cut_off_is_measured_again_and_spoils_no_other(tmp_path):
    _, _, plan = shared()
    journal = tmp_path / "journal"
    measure_layers(Counting(), plan, "multiply_adds", journal, say)
    journal.write_bytes(journal.read_bytes()[:-30])
    again = Counting()
    measure_layers(again, plan, "multiply_adds", journal, say)
    assert again.made == [plan.layers[-1].module]
    once_more = Counting()
    measure_layers(once_more, plan, "multiply_adds", journal, say)
    assert once_more.made == []


def test_rows_of_the_journal_are_taken_as_they_are(tmp_path, bench):
    _, _, plan = shared()
    row = Row("block.conv", "static", 12.5, 0.5, 7.0)
    (tmp_path / "journal").write_text(json.dumps(dataclasses.asdict(row)) + "\n")
    rows = measure_layers(bench, plan, "multiply_adds", tmp_path / "journal", say)
    assert row in rows


def test_seconds_are_measured_of_every_layer(bench):
    _, _, plan = shared()
    seconds = bench.costs("seconds")
    assert seconds.keys() == {one.module for one in plan.layers}
    assert all(value > 0 for value in seconds.values())
    assert not any(layer._forward_hooks for layer in bench.module.modules())


def test_similarity_falls_with_structure_and_is_1_for_no_picture():
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(1, 2, 12, 12)).astype(np.float32)
    noisy = picture + rng.normal(size=picture.shape).astype(np.float32)
    assert similarity(picture, picture) == pytest.approx(1)
    assert similarity(picture, noisy) < 0.9
    assert similarity(np.zeros_like(picture), np.zeros_like(picture)) == pytest.approx(1)
    assert similarity(picture[0, 0], noisy[0, 0]) == 1


def test_one_pass_ranks_layers_by_what_their_own_output_loses():
    network, calls, plan = shared()
    bench = Bench(network, CONTRACT, calls)
    # One layer's grid is sixteen times too wide.
    coarse = [
        dataclasses.replace(
            one, activation=Range(16 * one.activation.low, 16 * one.activation.high)
        )
        if one.module == "block.conv" and one.activation
        else one
        for one in plan.layers
    ]
    state = state_of(network)
    rows = rank_layers(bench, dataclasses.replace(plan, layers=tuple(coarse)), {}, 3)
    assert [row.module for row in rows] == [one.module for one in plan.layers]
    assert min(rows, key=lambda row: row.sqnr_db).module == "block.conv"
    assert bench.measurements == 0
    assert all(np.array_equal(state[name], value) for name, value in state_of(network).items())
    exact = rank_layers(bench, plan, {}, 3)
    assert all(20 < row.sqnr_db < 80 for row in exact)


def test_weights_are_float_only_while_their_layer_computes():
    """A simulated layer keeps its weights in 8 bits: the network's own are never held twice."""
    network, calls, plan = shared()
    own = {name: value.data_ptr() for name, value in network.named_parameters()}
    foreign = []

    def look(_, __):
        foreign.append(sum(v.data_ptr() != own[n] for n, v in network.named_parameters()
                           if n.endswith("weight")))  # fmt: skip

    hooks = [one.register_forward_pre_hook(look) for one in network.modules()]
    try:
        Bench(network, CONTRACT, calls[:1]).sqnr_db(plan)
    finally:
        for hook in hooks:
            hook.remove()
    assert foreign and max(foreign) <= 1
