"""surgery.json: read strictly, replayed in order."""

import json
from typing import Literal

import pytest

from diffoundry.errors import ModelError
from diffoundry.models import surgery
from diffoundry.models.components import load_component
from diffoundry.models.surgery import SCHEMA, Operation, read_surgery
from tests.mini_pipelines import make_named


def write(folder, operations, schema=SCHEMA, **more):
    data = {"schema": schema, "operations": operations, **more}
    (folder / "surgery.json").write_text(json.dumps(data))


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        read_surgery(folder)
    return caught.value.text()


class Scale(Operation):
    """Multiplies conv_in's bias, then adds to it: the order of two operations shows."""

    operation: Literal["scale"]
    factor: float
    offset: float = 0.0

    def apply(self, network, folder):
        network.conv_in.bias.data = network.conv_in.bias.data * self.factor + self.offset


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(surgery.OPERATIONS, "scale", Scale)


def test_no_file_means_no_operations(tmp_path):
    assert read_surgery(tmp_path) == ()


def test_an_unknown_operation_is_refused_by_name(tmp_path):
    write(tmp_path, [{"operation": "fuse_lora"}])
    assert "'fuse_lora'" in refusal(tmp_path)


def test_a_near_miss_is_suggested(tmp_path, known):
    write(tmp_path, [{"operation": "scael"}])
    assert "did you mean 'scale'?" in refusal(tmp_path)


@pytest.mark.parametrize(
    "operation", [{"operation": "scale"}, {"operation": "scale", "factor": 1, "extra": 2}]
)
def test_wrong_fields_are_named(tmp_path, known, operation):
    write(tmp_path, [operation])
    text = refusal(tmp_path)
    assert "factor" in text or "extra" in text


@pytest.mark.parametrize("change", [{"schema": "diffoundry.surgery/2"}, {"more": 1}])
def test_another_format_is_refused(tmp_path, change):
    write(tmp_path, [], **change)
    refusal(tmp_path)


def test_operations_are_replayed_in_order(tmp_path, known):
    folder = make_named(tmp_path, "sd") / "unet"
    bias = load_component(folder, "unet").network.conv_in.bias
    first = {"operation": "scale", "factor": 2.0, "offset": 1.0}
    write(folder, [first, {"operation": "scale", "factor": 3.0}])
    changed = load_component(folder, "unet").network.conv_in.bias
    assert changed.tolist() == pytest.approx((3 * (2 * bias + 1)).tolist())


def test_the_loader_refuses_what_it_cannot_replay(tmp_path):
    folder = make_named(tmp_path, "sd") / "unet"
    write(folder, [{"operation": "prune"}])
    with pytest.raises(ModelError, match="'prune'"):
        load_component(folder, "unet")
