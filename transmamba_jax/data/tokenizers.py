"""Tokenizers: raw bytes, or any `tokenizer.json` of the tokenizers library.

Both can be written as text and read back, so that a checkpoint carries its tokenizer.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from tokenizers import processors

from transmamba_jax.data.symbol_tokenizer import SymbolTokenizer
from transmamba_jax.runtime.paths import expand_path, show_path

END_OF_DOCUMENT = "<|endoftext|>"
"""The special token that ends a document in tokenizers trained here."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # as byte fallback spells a byte
_TRIED_CUTS = 64
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|end|>", "[EOS]", "<EOS>")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_document(self) -> int:
        """Id that follows the last token of every document."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token."""

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the ids of a UTF-8 document and the end-of-document id, int32 [T]."""

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of UTF-8 texts and the bytes of the text that each id stands for, int32 [T] both.

        The bytes add up to `len(text)` whatever the tokenizer adds or drops; only a text without ids has none.
        """

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the bytes that each id stands for in any text, int32 [T]; None: they depend on the text."""

    def find_cut(self, text: str, start: int) -> int | None:
        """Return a position from `start` on where cutting `text` leaves its ids as they are; None: there is none."""

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

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`, NUL as space."""
        return list(text.encode("utf-8").replace(b"\0", b" "))

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the bytes of `document` and a 0, int32 [T]."""
        return np.frombuffer(document.replace(b"\0", b" ") + b"\0", np.uint8).astype(np.int32)

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the bytes of each text and ones, int32 [T] both."""
        return [
            (np.frombuffer(text.replace(b"\0", b" "), np.uint8).astype(np.int32), np.ones(len(text), np.int32))
            for text in texts
        ]

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """Return ones, int32 [T]."""
        return np.ones(len(ids), np.int32)

    def find_cut(self, text: str, start: int) -> int | None:
        """Return `start`: bytes do not depend on one another."""
        return min(start, len(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes `ids`; ids from 256 on, which a padded vocabulary has, are nothing."""
        return bytes(int(index) for index in ids if 0 <= index < 256).decode("utf-8", errors="replace")

    def decode_stable(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes `ids` without a character at the end that lacks bytes."""
        return self.decode(ids).removesuffix(_REPLACEMENT)

    def to_json(self) -> str:
        """Return the name of this tokenizer as JSON."""
        return json.dumps({"tokenizer": "bytes"})


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library.

    Text that spells a special token stays text, but where the tokenizer's own model has the spelling as a piece, as
    those of T5 (Unigram) have `</s>`.

    A document ends with the added token that `end_of_document` names; else with the one that the post-processor puts
    behind a text and nothing else; else with the first that is there of a few known names. A named one is given to the
    post-processor, so that the text of `to_json` has it too, in a form that other programs understand.
    """

    def __init__(self, text: str, where: str, end_of_document: str | None = None):
        """Read the JSON `text`; `where` names it in error messages.

        Raises:
            ValueError: `text` is not a tokenizer, drops merges at random, has no tokens, or none ends a document.
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
                f"data.end_of_document={end_of_document!r} is none of the added tokens of {where}, found "
                f"{', '.join(map(repr, added)) or 'none'}. {_how_to_add(where, end_of_document)}"
            )
        appended = _appended(json.loads(self.to_json())["post_processor"])
        ends = [name for name in (end_of_document, appended, *_KNOWN_ENDS) if name in added]
        if not ends:
            raise ValueError(_without_an_end(where, added))
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

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the ids of `document` and the end-of-document id, int32 [T]."""
        return np.append(self._encode_fast([document])[0], np.int32(self.end_of_document))

    def _encode_fast(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        # The fast form leaves out the places of the tokens in the text, a quarter of the time.
        encodings = self._tokenizer.encode_batch_fast(
            [text.decode("utf-8") for text in texts], add_special_tokens=False
        )
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each text and the bytes that each id stands for, int32 [T] both.

        Ids of a byte-level vocabulary have lengths of their own. Others may add a space, change characters or drop
        some, so bytes are counted from the end of the token before to the end of the token.
        """
        if self._id_bytes is None:
            return [self._count(text) for text in texts]
        found = [(ids, self._id_bytes[ids]) for ids in self._encode_fast(texts)]
        return [
            (ids, lengths) if int(lengths.sum()) == len(text) else self._count(text)
            for text, (ids, lengths) in zip(texts, found, strict=True)
        ]

    def _count(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        ends = np.fromiter((end for _, end in encoding.offsets), np.int64, len(ids))  # in characters
        if not text.isascii():
            starts = np.flatnonzero(np.frombuffer(text, np.int8) >= -64)  # bytes that do not continue a character
            ends = np.append(starts, len(text))[ends]
        ends[-1:] = len(text)
        return ids, np.diff(np.maximum.accumulate(ends), prepend=0).astype(np.int32)

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the bytes of ids of a byte-level vocabulary, int32 [T]; None for others."""
        return None if self._id_bytes is None else self._id_bytes[ids]

    @functools.cached_property
    def _id_bytes(self) -> np.ndarray | None:
        """Bytes per id of a byte-level vocabulary, int32 [V]; None where it adds a space to a text, and for others."""
        if "ByteLevel" not in _decoder_kinds(json.loads(self.to_json())["decoder"]):
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            # A token is written with one character per byte, an added token as it is.
            lengths[index] = len(added[index].content.encode("utf-8")) if index in added else len(token)
        return lengths if lengths[self.encode("a")].sum() == 1 else None

    def find_cut(self, text: str, start: int) -> int | None:
        """Return a position from `start` on where both parts of `text`, encoded alone, have the ids of the whole.

        Ends of lines are tried first, then starts of words, then ends of other tokens.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        places = [place for place, _ in encoding.offsets if max(start, 1) <= place < len(text)]
        places += [place - 1 for place in places if place > max(start, 1)]  # where offsets leave out a space before

        def rank(place: int) -> int:
            return 0 if text[place - 1] == "\n" else 1 if text[place].isspace() else 2

        for place in sorted(dict.fromkeys(places), key=rank)[:_TRIED_CUTS]:
            if self.encode(text[:place]) + self.encode(text[place:]) == encoding.ids:
                return place
        return None

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
        parsed = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{where} is not a tokenizer.json that the tokenizers library can read: {error}") from None
    if dropout := getattr(parsed.model, "dropout", None):
        raise ValueError(
            f"{where} drops merges at random (dropout of its model: {dropout}): a document has other tokens each time "
            f"that it is read, and a resumed run other rows. Set model.dropout to null in the file"
        )
    return parsed


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


def _without_an_end(where: str, added: Sequence[str]) -> str:
    if not added:
        return (
            f"{where} has no end-of-document token: it has no added tokens at all. "
            f"{_how_to_add(where, END_OF_DOCUMENT)}"
        )
    return (
        f"{where} has no end-of-document token: its added tokens are {', '.join(map(repr, added))}, none of them is "
        f"known as one ({', '.join(_KNOWN_ENDS)}); name it with data.end_of_document. Where none of them ends a "
        f"document: {_how_to_add(where, END_OF_DOCUMENT)}"
    )


def _how_to_add(where: str, token: str) -> str:
    return (
        f"Add one with: python -c \"from tokenizers import Tokenizer; t = Tokenizer.from_file('{where}'); "
        f"t.add_special_tokens(['{token}']); t.save('{where}')\" and let model.vocab_size have room for it"
    )


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
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ValueError(
            "data.tokenizer must be 'bytes' or a tokenizer.json, which `transmamba train-tokenizer` writes; "
            f"cannot read '{show_path(spec)}': {reason}"
        ) from None
    return JsonTokenizer(text, show_path(spec), end_of_document)


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
