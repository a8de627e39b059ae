"""LPIPS: nothing between equal pictures, more with more noise, and only whole weight files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from diffoundry.errors import ContractError, ModelError
from diffoundry.quality.lpips import ALEXNET, SCALE, SHIFT, VGG16, Lpips, Trunk, open_lpips
from tests.core.quality.weights import add_noise, lpips_tensors, make_lpips, make_pictures


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    return open_lpips(make_lpips(tmp_path_factory.mktemp("lpips") / "a.safetensors", ALEXNET))


def test_equal_pictures_are_no_distance_apart(alexnet: Lpips) -> None:
    pictures = make_pictures(3, 0)
    assert np.array_equal(alexnet.distances(pictures, pictures), np.zeros(3))


@pytest.mark.parametrize("trunk", [ALEXNET, VGG16], ids=["alexnet", "vgg16"])
def test_more_noise_is_further_away(trunk: Trunk, tmp_path: Path) -> None:
    metric = open_lpips(make_lpips(tmp_path / "w.safetensors", trunk))
    assert metric.trunk is trunk
    pictures = make_pictures(2, 1)
    means = [metric.distances(pictures, add_noise(pictures, s)).mean() for s in (0, 5, 20, 60)]
    assert means[0] == 0 and means == sorted(means) and len(set(means)) == 4


def test_it_is_symmetric_and_pairwise(alexnet: Lpips) -> None:
    one, other, third = make_pictures(3, 2)
    there = alexnet.distances([one, one], [other, third])
    back = alexnet.distances([third, other], [one, one])
    assert there == pytest.approx(back[::-1], rel=1e-5) and there[0] != there[1]


def test_it_is_the_published_sum(alexnet: Lpips) -> None:
    """AlexNet written out: five layers' unit vectors, squared difference, heads, mean, sum."""
    t = alexnet.tensors

    def taps(picture: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32)) / 127.5 - 1
        x = (x - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1)
        found = []
        for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if index in (3, 6):
                x = functional.max_pool2d(x, 3, 2)
            x = functional.conv2d(x, t[f"features.{index}.weight"],
                                  t[f"features.{index}.bias"], stride, padding).relu()  # fmt: skip
            found.append(x[0].flatten(1))
        return found

    one, other = make_pictures(2, 3, side=80)
    total = 0.0
    for number, (a, b) in enumerate(zip(taps(one), taps(other), strict=True)):
        gap = (a / (a.norm(dim=0) + 1e-10) - b / (b.norm(dim=0) + 1e-10)) ** 2
        total += float((t[f"lin{number}.model.1.weight"].flatten() @ gap).mean())
    assert alexnet.distances([one], [other])[0] == pytest.approx(total, rel=1e-5)


def test_small_pictures_are_enlarged_and_sizes_must_agree(alexnet: Lpips) -> None:
    one, other = make_pictures(2, 4, side=16)
    assert alexnet.distances([one], [other])[0] > 0
    with pytest.raises(ContractError, match="one size"):
        alexnet.distances([one], [make_pictures(1, 4, side=32)[0]])


def test_both_spellings_of_the_names_give_the_same(alexnet: Lpips, tmp_path: Path) -> None:
    other = open_lpips(make_lpips(tmp_path / "w.safetensors", ALEXNET, spelling=1))
    pictures = make_pictures(2, 5)
    assert alexnet.distances(pictures[:1], pictures[1:]) == other.distances(
        pictures[:1], pictures[1:]
    )


def test_one_error_lists_everything_that_is_missing(tmp_path: Path) -> None:
    tensors = lpips_tensors(ALEXNET)
    for name in ("lin2.model.1.weight", "features.8.bias"):
        del tensors[name]
    tensors["features.3.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as error:
        open_lpips(tmp_path / "w.safetensors")
    for words in ("3 do not fit", "no lin2.model.1.weight", "no features.8.bias",
                  "features.3.bias is [7], not [192]", "AlexNet", "docs/quality.md"):  # fmt: skip
        assert words in str(error.value)


def test_heads_alone_lack_the_trunk(tmp_path: Path) -> None:
    """What the lpips package itself ships."""
    heads = {k: v for k, v in lpips_tensors(VGG16).items() if k.startswith("lin")}
    save_file(heads, tmp_path / "vgg.safetensors")
    with pytest.raises(ModelError, match=r"no features\.0\.weight"):
        open_lpips(tmp_path / "vgg.safetensors")


def test_values_that_no_distance_can_have_are_refused(tmp_path: Path) -> None:
    tensors = lpips_tensors(ALEXNET)
    tensors["lin0.model.1.weight"][0, 0] = -1
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="negative"):
        open_lpips(tmp_path / "w.safetensors")
    tensors["lin0.model.1.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"NaN or infinity in lin0\.model\.1\.weight"):
        open_lpips(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ""])
def test_a_pickle_is_refused_unread(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vgg{suffix}"
    path.write_bytes(b"not even looked at")
    with pytest.raises(ModelError, match=r"may be a pickle.*\n.*save_file"):
        open_lpips(path)
    with pytest.raises(ModelError, match="nothing there"):
        open_lpips(tmp_path / "absent.safetensors")
