"""The light tokenizer gives the ids of transformers' CLIPTokenizer."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffoundry.errors import ModelError
from diffoundry.models.tokenizer import Tokenizer
from tests.mini_pipelines import BOS, EOS, WORDS, write_tokenizer

TOKENS = 24
FIXED = (
    "",
    " ",
    "\n\t \r\n",
    "a small red circle",
    "  A  Small\n RED\tcat!! ",
    "café déjà vu CAFÉ cafe\u0301",
    "日本語の猫の写真、夜",
    "한국어 고양이",
    "🎉👩‍👩‍👧‍👦 party 🏳️‍🌈",
    "it's 12345 o'clock, isn't it? we'LL see 'D 're",
    "!!! wow! a cat!",
    "Ünïcödé ẞß ǅ İstanbul ﬁ ﷺ",
    "\u00a0\u200b\u2028\ufeff zero width",
    "\x00\x01 control",
    f"{EOS} a {BOS}cat{EOS}",
    f"{EOS.upper()} {BOS}{BOS}  {EOS} <|endoftext",
    "x" * 300,
    "a " * 100,
    "…—–«»„“” #$%^&*()_+{}|:<>?~`-=[]\\;',./",
)
SCRIPTS = ((32, 126), (160, 591), (880, 1279), (1424, 1535), (12353, 12543), (19968, 20200),
           (44032, 44200), (128512, 128590), (0x300, 0x36F))  # fmt: skip


def thousand_texts() -> list[str]:
    """FIXED, then seeded mixes of words, letters of many scripts, spaces and special tokens."""
    numbers = random.Random(0)
    pieces = [*WORDS, BOS, EOS, "!", "'s", " ", "  ", "\n", "42", ",", "é", "👍🏽", "Circle", "CAT"]
    texts = list(FIXED)
    while len(texts) < 1000:
        parts = []
        for _ in range(numbers.randrange(1, 20)):
            if numbers.random() < 0.5:
                parts.append(numbers.choice(pieces))
            else:
                low, high = numbers.choice(SCRIPTS)
                parts += [chr(numbers.randint(low, high)) for _ in range(numbers.randrange(1, 6))]
        texts.append(numbers.choice(("", " ")).join(parts))
    return texts


@pytest.mark.parametrize("as_json", [False, True], ids=["slow_files", "tokenizer_json"])
@pytest.mark.parametrize("pad", [EOS, "!"], ids=["pad_end", "pad_exclamation"])
def test_same_ids_as_transformers_on_a_thousand_texts(tmp_path, pad, as_json):
    assert differences(write_tokenizer(tmp_path, TOKENS, pad, as_json)) == []


def test_same_ids_for_the_embedded_model():
    from diffoundry import embedded

    folder = Path(next(iter(embedded.__path__))) / "shapes-lcm/tokenizer"
    if not folder.exists():
        pytest.skip("the embedded model is not trained yet")
    assert differences(folder) == []


def differences(folder):
    from transformers import CLIPTokenizer

    original, ours = CLIPTokenizer.from_pretrained(folder), Tokenizer.open(folder)
    assert ours.tokens == original.model_max_length
    wrong = []
    for text in thousand_texts():
        expected = original(
            text, padding="max_length", max_length=original.model_max_length, truncation=True
        )
        found = ours.encode(text)
        if (found.ids.tolist(), found.attention_mask.tolist()) != (
            expected["input_ids"],
            expected["attention_mask"],
        ):
            wrong.append(text)
    return wrong


def test_same_ids_with_the_config_that_transformers_4_wrote(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    token = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    config["added_tokens_decoder"] = {
        str(vocabulary[BOS]): {"content": BOS, **token, "special": True},
        str(vocabulary[EOS]): {"content": EOS, **token, "normalized": False, "special": True},
        str(len(vocabulary)): {"content": "<toy>", **token, "special": False},
    }
    for name in ("bos_token", "eos_token", "unk_token"):
        config[name] = config[name]["content"]
    path.write_text(json.dumps(config))
    assert differences(folder) == []
    assert Tokenizer.open(folder).largest_id == len(vocabulary)


def test_ids_are_int64_of_the_declared_length(tmp_path):
    encoding = Tokenizer.open(write_tokenizer(tmp_path, TOKENS)).encode("a cat")
    assert encoding.ids.dtype == np.int64
    assert encoding.ids.shape == encoding.attention_mask.shape == (TOKENS,)
    assert encoding.lost == ""


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("a small red circle on the cat", "on the cat"),
        ("a  small\tred  circle   ON the Cat! ", "ON the Cat!"),
        ("a small red circle", ""),
        ("a small red watercolour", "watercolour"),
        ("a small red été", "été"),
        ("", ""),
    ],
)
def test_truncation_reports_the_words_that_were_lost(tmp_path, text, lost):
    tokenizer = Tokenizer.open(write_tokenizer(tmp_path, 6))
    assert tokenizer.encode(text).lost == lost


def test_a_script_without_spaces_loses_only_what_was_cut(tmp_path):
    tokenizer = Tokenizer.open(write_tokenizer(tmp_path, 8))
    assert tokenizer.encode("日本語").lost == "語"


def test_half_a_surrogate_pair_is_taken_for_an_unknown_letter(tmp_path):
    tokenizer = Tokenizer.open(write_tokenizer(tmp_path, TOKENS))
    assert tokenizer.encode("a \udcff cat").ids.tolist() == (
        tokenizer.encode("a \ufffd cat").ids.tolist()
    )


def test_the_length_can_be_given(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    assert len(Tokenizer.open(folder, 7).encode("a cat").ids) == 7


def test_opening_imports_neither_torch_nor_transformers(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    code = (
        "import sys; from diffoundry.models.tokenizer import Tokenizer;"
        f"Tokenizer.open(__import__('pathlib').Path({str(folder)!r})).encode('a cat');"
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def refusal(folder, **options) -> str:
    with pytest.raises(ModelError) as caught:
        Tokenizer.open(folder, **options)
    return caught.value.text()


def test_refuses_a_tokenizer_without_a_length(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    (folder / "tokenizer_config.json").unlink()
    assert "model_max_length" in refusal(folder)
    assert Tokenizer.open(folder, TOKENS).tokens == TOKENS


def test_refuses_merges_of_another_vocabulary(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    with (folder / "merges.txt").open("a", encoding="utf-8") as stream:
        stream.write("zz yy\n")
    assert "'zz'" in refusal(folder)


@pytest.mark.parametrize("line", ["one", "one two three"])
def test_refuses_damaged_merges(tmp_path, line):
    folder = write_tokenizer(tmp_path, TOKENS)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{line}\n")
    assert line in refusal(folder)


def test_refuses_a_damaged_vocabulary(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    (folder / "vocab.json").write_text('{"a": "one"}')
    assert "an id for 'a'" in refusal(folder)


def test_refuses_a_tokenizer_json_of_another_kind(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0]]}}')
    assert "Unigram" in refusal(folder)


def test_refuses_textual_inversion_of_several_vectors(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    (folder / "added_tokens.json").write_text('{"<toy>": 600, "<toy>_1": 601}')
    assert "<toy>" in refusal(folder)


def test_refuses_a_missing_vocabulary(tmp_path):
    folder = write_tokenizer(tmp_path, TOKENS)
    shutil.move(folder / "vocab.json", folder / "other.json")
    assert "vocab.json" in refusal(folder)
