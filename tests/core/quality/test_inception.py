"""FID's InceptionV3: the usual names and shapes, its own pooling, features that tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffoundry.errors import ModelError
from diffoundry.quality.frechet import frechet_distance
from diffoundry.quality.inception import BlockE, Inception, averaged, features, open_inception
from tests.core.quality.weights import add_noise, make_inception, make_pictures


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inception(tmp_path_factory.mktemp("fid") / "inception.safetensors")


@pytest.fixture(scope="module")
def network(path: Path) -> Inception:
    return open_inception(path)


def test_it_has_the_parameters_of_inception_v3_without_its_head() -> None:
    """Keras counts 21,802,784 with means and variances but without scales (2 × 17,216 each)."""
    with torch.device("meta"):
        whole = Inception()
    assert sum(p.numel() for p in whole.parameters()) == 21_802_784 - 17_216
    names = whole.state_dict()
    assert names["Mixed_6b.branch7x7dbl_4.conv.weight"].shape == (128, 128, 7, 1)
    assert names["Mixed_7c.branch3x3dbl_3a.bn.running_var"].shape == (384,)
    assert names["Conv2d_4a_3x3.conv.weight"].shape == (192, 80, 3, 3)


def test_averages_leave_out_the_padding_and_the_last_block_takes_the_maximum() -> None:
    assert torch.equal(averaged(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    network = Inception()
    assert isinstance(network.Mixed_7b, BlockE) and not network.Mixed_7b.largest
    assert network.Mixed_7c.largest


def test_equal_sets_are_zero_apart_and_noise_moves_them(network: Inception) -> None:
    pictures = make_pictures(3, 0)
    plain = features(network, pictures)
    assert plain.shape == (3, 2048) and np.isfinite(plain).all()
    little, much = (features(network, add_noise(pictures, sigma)) for sigma in (15, 60))
    scale = float(np.square(plain - plain.mean(0)).sum())
    assert frechet_distance(plain, plain) < 1e-9 * scale
    assert 1e-3 * scale < frechet_distance(plain, little) < frechet_distance(plain, much)


def test_missing_tensors_and_pickles_are_refused(path: Path, tmp_path: Path) -> None:
    state = load_file(path)
    del state["Mixed_5b.branch1x1.conv.weight"], state["Mixed_7c.branch_pool.bn.running_mean"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as error:
        open_inception(tmp_path / "w.safetensors")
    assert "2 do not fit" in str(error.value)
    assert "no Mixed_5b.branch1x1.conv.weight" in str(error.value)
    (tmp_path / "pt_inception.pth").write_bytes(b"")
    with pytest.raises(ModelError, match="may be a pickle"):
        open_inception(tmp_path / "pt_inception.pth")
