"""Tokenizers: raw bytes, or any `tokenizer.json` of the tokenizers library.

Both can be written as text and read back, so that a checkpoint carries its tokenizer.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import processors

from transmamba_jax.runtime.paths import expand_path

END_OF_DOCUMENT = "<|endoftext|>"
"""The special token that ends a document in tokenizers trained here."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # as byte fallback spells a byte
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|end|>", "[EOS]", "<EOS>")


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
        """Return the text of `ids`; a part of a character becomes U+FFFD, an id without a token nothing."""

    def decode_stable(self, ids: Sequence[int]) -> str:
        """Return the part of the text of `ids` that stays as it is, whatever ids follow."""

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
        """Return the text of the bytes `ids`; ids from 256 on, which a padded vocabulary has, are nothing."""
        return bytes(int(index) for index in ids if 0 <= index < 256).decode("utf-8", errors="replace")

    def decode_stable(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes `ids` without a character at the end that lacks bytes."""
        return self.decode(ids).removesuffix(_REPLACEMENT)

    def to_json(self) -> str:
        """Return the name of this tokenizer as JSON."""
        return json.dumps({"tokenizer": "bytes"})


class SymbolTokenizer:
    """The ids of a synthetic task, written as numbers with spaces between them; each counts as one byte."""

    end_of_document = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @property
    def token_bytes(self) -> np.ndarray:
        """Return ones: bits per byte of a task are bits per token."""
        return np.ones(self.vocab_size, np.int32)

    def encode(self, text: str) -> list[int]:
        """Read numbers with spaces between them.

        Raises:
            ValueError: something else is in the text, or a number is not an id.
        """
        words = text.split()
        bad = [word for word in words if not word.isdecimal() or int(word) >= self.vocab_size]
        if bad:
            raise ValueError(f"text of a synthetic task must be ids 0..{self.vocab_size - 1}, found {bad[0]!r}")
        return [int(word) for word in words]

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the ids of a document and the end-of-document id, int32 [T]."""
        return np.array([*self.encode(document.decode()), self.end_of_document], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Write ids as numbers; those from `vocab_size` on, which a padded vocabulary has, are left out."""
        return " ".join(str(int(token)) for token in ids if 0 <= token < self.vocab_size)

    def decode_stable(self, ids: Sequence[int]) -> str:
        """Write ids as numbers: what stands there stays."""
        return self.decode(ids)

    def to_json(self) -> str:
        """Return a text that `tokenizer_from_json` reads back."""
        return json.dumps({"tokenizer": "symbols", "vocab_size": self.vocab_size})


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library.

    Text that spells a special token stays text. `token_bytes` is exact for byte-level vocabularies and for
    SentencePiece vocabularies with byte fallback; for others (those that drop case or spaces) it is the length of the
    decoded token.

    A document ends with the added token that `end_of_document` names; else with the one that the post-processor puts
    behind a text and nothing else; else with the first that is there of a few known names. A named one is given to the
    post-processor, so that the text of `to_json` has it too, in a form that other programs understand.
    """

    def __init__(self, text: str, where: str, end_of_document: str | None = None):
        """Read the JSON `text`; `where` names it in error messages.

        Raises:
            ValueError: `text` is not a tokenizer, has no tokens, or none that can end a document.
        """
        self._tokenizer = _parse(text, where)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._where = where
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{where} is a tokenizer without a single token; train one, or use data.tokenizer: bytes")
        self.vocab_size = max(vocabulary.values()) + 1
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        if end_of_document is not None and end_of_document not in added:
            raise ValueError(
                f"data.end_of_document={end_of_document!r} is none of the added tokens of {where}, found {added}"
            )
        appended = _appended(json.loads(self.to_json())["post_processor"])
        ends = [name for name in (end_of_document, appended, *_KNOWN_ENDS) if name in added]
        if not ends:
            raise ValueError(
                f"{where} has no end-of-document token: its added tokens are {added}, none of them is known as one "
                f"({', '.join(_KNOWN_ENDS)}); name it with data.end_of_document"
            )
        self.end_of_document = vocabulary[ends[0]]
        if end_of_document not in (None, appended):
            self._append(ends[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as JSON: worker processes get their own copy."""
        return JsonTokenizer, (self.to_json(), self._where)

    def _append(self, end: str) -> None:
        """Let the post-processor put the token `end` behind a text, as the last thing that it does."""
        named = {"id": "end", "ids": [self.end_of_document], "tokens": [end]}
        template = processors.TemplateProcessing(single="$A end", special_tokens=[named])
        present = self._tokenizer.post_processor
        self._tokenizer.post_processor = template if present is None else processors.Sequence([present, template])

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
        """Return the text of `ids`, special tokens spelt out; an id without a token is nothing."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)

    def decode_stable(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without what further ids may change.

        A byte-level decoder writes one U+FFFD for a last character that lacks bytes. Byte fallback writes U+FFFD for
        every byte of a run of byte tokens that is not UTF-8 as a whole, so the run at the end is left out.
        """
        stop = len(ids)
        while self._falls_back_to_bytes and stop and self._may_be_in_a_run(int(ids[stop - 1])):
            stop -= 1
        return self.decode(ids[:stop]).removesuffix(_REPLACEMENT)

    @functools.cached_property
    def _falls_back_to_bytes(self) -> bool:
        return "ByteFallback" in _decoder_kinds(json.loads(self.to_json())["decoder"])

    def _may_be_in_a_run(self, index: int) -> bool:
        token = self._tokenizer.id_to_token(index)
        return token is None or _BYTE_TOKEN.fullmatch(token) is not None  # an id without a token is passed over

    def to_json(self) -> str:
        """Return the text of the tokenizer.json."""
        return self._tokenizer.to_str()


def _parse(text: str, where: str) -> tokenizers.Tokenizer:
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
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{where} is not a tokenizer.json that the tokenizers library can read: {error}") from None


def _appended(post_processor: dict[str, Any] | None) -> str | None:
    """Name the token that a post-processor's last part puts behind a text, where it does nothing else."""
    while post_processor is not None and post_processor["type"] == "Sequence":
        post_processor = post_processor["processors"][-1] if post_processor["processors"] else None
    if post_processor is None or post_processor["type"] != "TemplateProcessing":
        return None
    kinds, pieces = zip(*(item for piece in post_processor["single"] for item in piece.items()), strict=True)
    if kinds != ("Sequence", "SpecialToken"):
        return None
    return post_processor["special_tokens"][pieces[1]["id"]]["tokens"][-1]


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def load_tokenizer(spec: str, end_of_document: str | None = None) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names: `bytes`, or the path of a tokenizer.json.

    `end_of_document` names the token of a tokenizer.json that ends a document; None: see `JsonTokenizer`.

    Raises:
        ValueError: the file cannot be read or is not a tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    try:
        text = expand_path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.tokenizer must be 'bytes' or the path of a tokenizer.json; cannot read {spec!r}: {error}"
        ) from None
    return JsonTokenizer(text, spec, end_of_document)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose `to_json` gave `text`."""
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    tree = json.loads(text) if text.startswith('{"tokenizer": "symbols"') else {}
    return SymbolTokenizer(tree["vocab_size"]) if tree else JsonTokenizer(text, "the tokenizer")


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
