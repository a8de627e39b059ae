"""CLIP's tokenizer without torch and transformers: the same ids, from the same files.

Byte-level BPE with "</w>" at the end of a word (Radford et al. 2021, section 2.4), as
transformers' CLIPTokenizer builds it; only the `tokenizers` library is needed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffoundry.errors import MissingToolError, ModelError
from diffoundry.formats.torch_module import model_file, read_json
from diffoundry.types import Array

if TYPE_CHECKING:
    import tokenizers

WORD_END = "</w>"
# As in transformers.CLIPTokenizer: special tokens, contractions, letters, one digit, the rest.
PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
DEFAULT_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# transformers writes 1e30 as the length where none was given.
NO_LENGTH = 1e9


@dataclass(frozen=True)
class Encoding:
    """Token ids [tokens] int64 of a prompt, padded; the same mask as transformers gives.

    `lost` is the end of the text that did not fit ("" when everything did), from the first word
    that was cut.
    """

    ids: Array
    attention_mask: Array
    lost: str


class Tokenizer:
    """Turns a prompt into the ids that the text encoder takes."""

    def __init__(self, backend: tokenizers.Tokenizer, tokens: int, ids: Mapping[str, int]) -> None:
        self._backend = backend
        self._ids = ids
        self.tokens = tokens

    @property
    def largest_id(self) -> int:
        """The largest id that `encode` can give."""
        return max(self._backend.get_vocab().values())

    @classmethod
    def open(cls, folder: Path, tokens: int | None = None) -> Tokenizer:
        """Read a tokenizer's folder: vocab.json and merges.txt, or tokenizer.json.

        `tokens` is the length to pad and cut to; None takes model_max_length of
        tokenizer_config.json. Raises ModelError.
        """
        config = _optional_json(folder, "tokenizer_config.json")
        length = tokens if tokens is not None else config.get("model_max_length")
        if not isinstance(length, int | float) or not 2 <= length < NO_LENGTH:
            raise ModelError(
                f"tokenizer {folder}",
                expected="a model_max_length of 2 or more in tokenizer_config.json",
                found=str(length),
                remedy="add it: the number of tokens of the text encoder",
            )
        added, special = _added_tokens(folder, config)
        _check_multi_vector(folder, added)
        backend = _build(folder, *_vocabulary(folder), [*added, *special.values()])
        ids = {
            name: int(backend.token_to_id(token["content"]) or 0) for name, token in special.items()
        }
        return cls(backend, int(length), ids)

    def encode(self, text: str) -> Encoding:
        """The ids of `text`: start token, pieces, end token, padding; cut to `tokens`."""
        # A terminal can hand over half a surrogate pair, which is no text.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encoded = self._backend.encode(text, add_special_tokens=False)
        room = self.tokens - 2
        body = encoded.ids[:room]
        used = [self._ids["bos_token"], *body, self._ids["eos_token"]]
        padding = self.tokens - len(used)
        ids = np.array([*used, *[self._ids["pad_token"]] * padding], dtype=np.int64)
        mask = np.array([1] * len(used) + [0] * padding, dtype=np.int64)
        lost = text[_first_lost(text, encoded, room) :].strip() if len(encoded.ids) > room else ""
        return Encoding(ids, mask, lost)


def _first_lost(text: str, encoded: tokenizers.Encoding, room: int) -> int:
    """Where the first word begins that was cut, wholly or in part."""
    start = int(encoded.offsets[room][0])
    while 0 < start < len(text) and _same_word(text[start - 1], text[start]):
        start -= 1
    return start


def _same_word(left: str, right: str) -> bool:
    # Letters of scripts without spaces (category Lo) are words of their own.
    return all(unicodedata.category(letter) in ("Ll", "Lu", "Lm", "Mn") for letter in (left, right))


Json = dict[str, Any]
Token = dict[str, Any]


def _token(value: Any, special: bool) -> Token:
    """A token as a config writes it: plain text, or an object with its content."""
    if not isinstance(value, dict):
        return {"content": str(value), "special": special, "normalized": not special}
    names = ("content", "lstrip", "rstrip", "single_word", "normalized")
    token = {name: value[name] for name in names if name in value}
    return {**token, "special": special or bool(value.get("special"))}


def _added_tokens(folder: Path, config: Json) -> tuple[list[Token], dict[str, Token]]:
    """Tokens added to the vocabulary in the order of their ids, and the four special tokens.

    As PreTrainedTokenizerBase._from_pretrained of transformers 5: added_tokens_decoder goes
    alone; without it special_tokens_map.json, added_tokens.json and tokenizer.json are read.
    """
    added: dict[int, Token] = {}
    table = dict(config)
    if "added_tokens_decoder" in config:
        for index, value in config["added_tokens_decoder"].items():
            added[int(index)] = _token(value, special=False)
    else:
        table.update(_optional_json(folder, "special_tokens_map.json"))
        named = {_content(table[name]) for name in DEFAULT_SPECIAL if table.get(name) is not None}
        for content, index in _optional_json(folder, "added_tokens.json").items():
            added[int(index)] = _token(content, special=content in named)
        for value in _optional_json(folder, "tokenizer.json").get("added_tokens", []):
            added[int(value["id"])] = _token(value, special=False)
    by_content = {str(token["content"]): token for token in added.values()}
    special = {}
    for name, default in DEFAULT_SPECIAL.items():
        value = default if table.get(name) is None else table[name]
        known = by_content.get(_content(value))
        special[name] = {**known, "special": True} if known else _token(value, special=True)
    return [added[index] for index in sorted(added)], special


def _content(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _optional_json(folder: Path, name: str) -> Json:
    return read_json(model_file(folder, name)) if (folder / name).exists() else {}


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges; tokenizer.json goes first, as in transformers."""
    if (folder / "tokenizer.json").exists():
        model = _optional_json(folder, "tokenizer.json").get("model", {})
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocabulary, dict) or not isinstance(merges, list):
            raise ModelError(
                str(folder / "tokenizer.json"),
                expected="a BPE model with vocab and merges, as CLIPTokenizer writes it",
                found=f"a model of type {model.get('type')}",
            )
        pairs = [row.split(" ") if isinstance(row, str) else row for row in merges]
        return vocabulary, _pairs(folder / "tokenizer.json", pairs)
    path = model_file(folder, "merges.txt")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(str(path), expected="merges as text", found=str(error)) from error
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    return read_json(model_file(folder, "vocab.json")), _pairs(path, rows)


def _pairs(path: Path, rows: list[list[str]]) -> list[tuple[str, str]]:
    for row in rows:
        if len(row) != 2:
            raise ModelError(str(path), expected="two pieces in each merge", found=" ".join(row))
    return [(left, right) for left, right in rows]


def _build(
    folder: Path,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: list[Token],
) -> tokenizers.Tokenizer:
    try:
        from tokenizers import AddedToken, Regex, Tokenizer as Backend, normalizers, pre_tokenizers
        from tokenizers.models import BPE
    except ImportError as error:
        raise MissingToolError(
            f"tokenizer {folder}",
            expected="the package tokenizers",
            found="not installed",
            remedy="pip install tokenizers",
        ) from error
    _check_merges(folder, vocabulary, merges)
    # fuse_unk, prefix and unknown token as CLIPTokenizer sets them; bytes leave nothing unknown.
    model = BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
        fuse_unk=False,
        unk_token=DEFAULT_SPECIAL["unk_token"],
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for token in added:
        add = backend.add_special_tokens if token["special"] else backend.add_tokens
        add([AddedToken(**token)])
    return backend


def _check_merges(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Raise ModelError for ids that are no numbers and merges of pieces that are not there."""
    for token, index in vocabulary.items():
        if not isinstance(index, int) or index < 0:
            raise ModelError(
                f"tokenizer {folder}", expected=f"an id for {token!r}", found=str(index)
            )
    for left, right in merges:
        unknown = [piece for piece in (left, right, left + right) if piece not in vocabulary]
        if unknown:
            raise ModelError(
                f"tokenizer {folder}",
                expected="merges of pieces that are in the vocabulary",
                found=f"the merge {left!r} {right!r}, of which {unknown[0]!r} is not there",
                remedy="vocabulary and merges come from different models",
            )


def _check_multi_vector(folder: Path, added: list[Token]) -> None:
    """Refuse textual inversion tokens of several vectors: diffusers rewrites prompts for them."""
    contents = {str(token["content"]) for token in added}
    several = sorted(content for content in contents if f"{content}_1" in contents)
    if several:
        raise ModelError(
            f"tokenizer {folder}",
            expected="textual inversion tokens of one vector",
            found=f"{', '.join(several)} with several",
            remedy="use the pipeline without this textual inversion",
        )
