"""Observers on the exported graph see what the layers of the module see."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compression.costs import count_multiply_adds
from diffoundry.compression.fx_observing import Watching, watch_layers
from diffoundry.compression.layers import find_layers
from diffoundry.compression.statistics import feeds_of
from diffoundry.errors import StageError
from tests.compilers.small_network import CONTRACT
from tests.core.compression.recorded import shared, watched_by_hooks


@pytest.fixture(scope="module")
def program():
    return trace(shared()[0], CONTRACT)


def test_inputs_and_outputs_are_the_modules_own(program):
    network, calls, _ = shared()
    layers = find_layers(network)
    taken, given = watch_layers(program, CONTRACT, calls, layers, Watching(outputs=layers))
    wanted_taken, wanted_given = watched_by_hooks(network, CONTRACT, calls)
    assert taken.keys() == given.keys() == wanted_taken.keys()
    for found, wanted in ((taken, wanted_taken), (given, wanted_given)):
        for name in wanted:
            assert found[name].low == pytest.approx(wanted[name].low, abs=1e-5), name
            assert found[name].high == pytest.approx(wanted[name].high, abs=1e-5), name
            np.testing.assert_allclose(found[name].mean, wanted[name].mean, atol=1e-5)
            assert len(found[name].samples) == len(calls)


def test_only_the_layers_asked_for_are_watched(program):
    _, calls, _ = shared()
    taken, given = watch_layers(program, CONTRACT, calls[:1], {"block.conv": "conv"})
    assert taken.keys() == {"block.conv"} and given == {}


def test_all_layers_that_the_graph_lacks_are_named(program):
    _, calls, _ = shared()
    wanted = {"block.conv": "conv", "no.such": "conv", "nor.this": "linear"}
    with pytest.raises(StageError, match=r"no node of no\.such, nor\.this"):
        watch_layers(program, CONTRACT, calls, wanted)


@pytest.mark.parametrize(("share", "looked_at"), [(0.1, 4), (4.2, 4), (5.2, 5), (100, 6)])
def test_where_a_call_is_dear_fewer_are_looked_at_but_never_too_few(program, share, looked_at):
    network, calls, _ = shared()
    layers = find_layers(network)
    costs = count_multiply_adds(network, feeds_of(CONTRACT, calls[0].feeds))
    said = []
    most = share * sum(costs.values())
    taken, _ = watch_layers(program, CONTRACT, calls, layers, Watching(most=most), said.append)
    assert {len(seen.samples) for seen in taken.values()} == {looked_at}
    assert bool(said) == (looked_at < 6)


def test_means_are_left_out_where_nobody_asks(program):
    network, calls, _ = shared()
    taken, _ = watch_layers(program, CONTRACT, calls, find_layers(network), Watching(means=False))
    assert all(seen.sums is None and seen.count for seen in taken.values())
