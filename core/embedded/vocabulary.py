"""The tokenizer: CLIP's layout and byte alphabet, with merges for the captions' words only."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diffoundry.embedded.networks import TOKENS
from diffoundry.embedded.scenes import COLOURS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = ("on", "background", *SIZES, *COLOURS, *SHAPES)


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(spare)]


def build_merges() -> list[tuple[str, str]]:
    """Merges that turn each of `WORDS` into one token, left to right: c i r c l e</w>."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        # A merge of an earlier word applies to this one too: replay them, in order, first.
        for pair in merges:
            pieces = _apply(pair, pieces)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges.append(pair)
            pieces = _apply(pair, pieces)
    return merges


def _apply(pair: tuple[str, str], pieces: list[str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer; it pads with the end token to 16 tokens, as CLIP does to 77."""
    from transformers import CLIPTokenizer

    letters = byte_alphabet()
    merges = build_merges()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
        merges_file.write_text("\n".join(lines), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, **_options())


def _options() -> dict[str, object]:
    return {
        "model_max_length": TOKENS,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
    }


def write_slow_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes vocab.json and merges.txt beside what `save_pretrained` wrote."""
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in build_merges()), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
