from __future__ import annotations

import json

import pytest

from diffoundry.errors import ArtifactError
from diffoundry.formats.documents import reading

SCHEMA = "diffoundry.thing/1.0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "another kind"),
        (json.dumps({"schema": "diffoundry.thing/2.0", "part": 1}), "another version"),
        (json.dumps({"schema": SCHEMA}), "KeyError: 'part'"),
        (json.dumps({"schema": SCHEMA, "part": "x"}), "ValueError"),
    ],
)
def test_whatever_is_wrong_is_one_error_that_names_file_and_schema(tmp_path, text, words):
    path = tmp_path / "thing.json"
    if text is not None:
        path.write_text(text)
    with (
        pytest.raises(ArtifactError, match=words) as caught,
        reading("thing", path, SCHEMA) as document,
    ):
        int(document["part"])
    assert str(path) in caught.value.where and caught.value.expected == SCHEMA


def test_a_whole_document_is_handed_over(tmp_path):
    path = tmp_path / "thing.json"
    path.write_text(json.dumps({"schema": SCHEMA, "part": 3}))
    with reading("thing", path, SCHEMA) as document:
        assert document["part"] == 3
