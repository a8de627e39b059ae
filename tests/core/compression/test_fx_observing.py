"""Observers on the exported graph see what the layers of the module see."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.compilers.exported_program_from_torch import trace
from diffoundry.compression.fx_observing import watch_layers
from diffoundry.compression.layers import find_layers
from diffoundry.errors import StageError
from tests.compilers.small_network import CONTRACT
from tests.core.compression.recorded import shared, watched_by_hooks


@pytest.fixture(scope="module")
def program():
    return trace(shared()[0], CONTRACT)


def test_inputs_and_outputs_are_the_modules_own(program):
    network, calls, _ = shared()
    taken, given = watch_layers(program, CONTRACT, calls, find_layers(network), outputs=True)
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
