"""The table of single layers."""

from __future__ import annotations

import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats import sensitivity
from diffoundry.formats.sensitivity import Row, Sensitivity

TABLE = Sensitivity(
    "unet",
    (Row("a.conv", "static", 41.5, 0.999, 1000.0), Row("a.out", "weight_only", 60.0, 1.0, 0.0)),
    whole_db=38.0,
    reached_db=40.5,
    budget_db=40.0,
    reverted=("a.conv",),
    settings={"calls": 8},
)


def test_it_comes_back_and_writes_the_same_bytes_twice(tmp_path):
    for name in ("one", "two"):
        sensitivity.save(tmp_path / name, TABLE)
    assert sensitivity.load(tmp_path / "one") == TABLE
    assert sensitivity.digest(tmp_path / "one") == sensitivity.digest(tmp_path / "two")
    assert sensitivity.size_bytes(tmp_path / "one") > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_text(path.read_text().replace("/1.0", "/2.0")),
        lambda path: path.write_text(path.read_text().replace("whole_db", "half_db")),
        lambda path: path.unlink(),
    ],
)
def test_damage_is_noticed(tmp_path, damage):
    sensitivity.save(tmp_path, TABLE)
    damage(tmp_path / sensitivity.FILE)
    with pytest.raises(ArtifactError):
        sensitivity.validate(tmp_path)
