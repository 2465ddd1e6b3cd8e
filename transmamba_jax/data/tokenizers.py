"""Tokenizers: raw bytes, or any `tokenizer.json` of the tokenizers library.

Both can be written as text and read back, so that a checkpoint carries its tokenizer.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
"""The special token that ends a document in tokenizers trained here."""

_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|end|>", "[EOS]", "<EOS>")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_document(self) -> int:
        """Id that follows the last token of every document."""

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [V]; the end of a document counts as one byte."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token."""

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the ids of a UTF-8 document and the end-of-document id, int32 [T]."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; a part of a character becomes U+FFFD."""

    def to_json(self) -> str:
        """Return a text that `tokenizer_from_json` reads back."""


class ByteTokenizer:
    """A token is a byte: 256 ids, id = byte value.

    Byte 0 ends a document. A NUL inside a document is read as a space, so byte offsets are kept.
    """

    vocab_size = 256
    end_of_document = 0

    @property
    def token_bytes(self) -> np.ndarray:
        """Ones, int32 [256]."""
        return np.ones(256, np.int32)

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`, NUL as space."""
        return list(text.encode("utf-8").replace(b"\0", b" "))

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the bytes of `document` and a 0, int32 [T]."""
        return np.frombuffer(document.replace(b"\0", b" ") + b"\0", np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes `ids`."""
        return bytes(np.asarray(ids, np.uint8).tolist()).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return the name of this tokenizer as JSON."""
        return json.dumps({"tokenizer": "bytes"})


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library.

    Text that spells a special token stays text. `token_bytes` is exact for byte-level vocabularies and for
    SentencePiece vocabularies with byte fallback; for others (those that drop case or spaces) it is the length of the
    decoded token.
    """

    def __init__(self, text: str, where: str):
        """Read the JSON `text`; `where` names it in error messages.

        Raises:
            ValueError: `text` is not a tokenizer, or has no token that can end a document.
        """
        _check_json(text, where)
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._where = where
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        ends = [name for name in _END_NAMES if name in added]
        if not ends:
            raise ValueError(
                f"{where} has no end-of-document token: one of {', '.join(_END_NAMES)} is needed among its added "
                f"tokens, found {added}"
            )
        self.end_of_document = vocabulary[ends[0]]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as JSON: worker processes get their own copy."""
        return JsonTokenizer, (self.to_json(), self._where)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes per id, int32 [V]; ids that no token has are 0."""
        kinds = _decoder_kinds(json.loads(self.to_json())["decoder"])
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                lengths[index] = len(added[index].content.encode("utf-8"))
            elif "ByteLevel" in kinds:
                lengths[index] = len(token)  # one character of the alphabet per byte
            elif "ByteFallback" in kinds:
                is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
                lengths[index] = 1 if is_byte else len(token.replace("\u2581", " ").encode("utf-8"))
            else:
                lengths[index] = len(self._tokenizer.decode([index]).encode("utf-8"))
        lengths[self.end_of_document] = 1
        return lengths

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the ids of `document` and the end-of-document id, int32 [T]."""
        # The fast form leaves out the places of the tokens in the text, a quarter of the time.
        (encoding,) = self._tokenizer.encode_batch_fast([document.decode("utf-8")], add_special_tokens=False)
        return np.array([*encoding.ids, self.end_of_document], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens spelt out."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Return the text of the tokenizer.json."""
        return self._tokenizer.to_str()


def _check_json(text: str, where: str) -> None:
    """Refuse what is not a tokenizer.json at a glance: the library itself raises a bare Exception."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not a tokenizer.json, it is not JSON: {error}") from None
    if not isinstance(tree, dict) or not {"model", "added_tokens", "decoder"} <= tree.keys():
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(
            f"{where} is not a tokenizer.json of the tokenizers library: the keys model, added_tokens and decoder are "
            f"needed, found {found}"
        )


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names: `bytes`, or the path of a tokenizer.json.

    Raises:
        ValueError: the file cannot be read or is not a tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    try:
        text = Path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.tokenizer must be 'bytes' or the path of a tokenizer.json; cannot read {spec!r}: {error}"
        ) from None
    return JsonTokenizer(text, spec)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose `to_json` gave `text`."""
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    return JsonTokenizer(text, "the tokenizer")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids do not fit the model.

    Raises:
        ValueError: `vocab_size` is smaller than the tokenizer's.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small for the tokenizer with ids 0..{tokenizer.vocab_size - 1}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
