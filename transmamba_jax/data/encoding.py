"""Turn documents into arrays of tokens that carry their bytes; a long document is read and encoded in parts."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from grain.experimental import FlatMapTransform

from transmamba_jax.data.documents import PART_BYTES, CompletionDocument, Documents, TokenDocument
from transmamba_jax.data.tokenizers import Tokenizer

TOKEN = np.dtype([("id", np.int32), ("bytes", np.int32)])
"""A token and the bytes of the document that it stands for; the end of a document counts as one byte.

The bytes n of a token that is not trained on are written as ~n = -1 - n.
"""

_LEFT_BYTES = 2**12
"""Text before a cut within which the tokenizer has to agree that it is one."""

_LAST_BYTES = 2**6
"""Text after the end of the last but one part that may be a single token, and then belongs to that part."""

_RIGHT_BYTES = 2**14
"""Text after the end of a part in which a cut is looked for."""


def encode_documents(tokenizer: Tokenizer, documents: Sequence[bytes]) -> list[np.ndarray]:
    """Return the tokens of each document and its end, int64 [T], a view of TOKEN; bytes add up to the document's and 1.

    One number per token: libraries that carry arrays look at the fields of a structured dtype each time.
    """
    texts = [text for document in documents for text in _texts(document)]
    counted = iter(tokenizer.encode_counted(texts))
    encoded, end = [], tokenizer.end_of_document
    for document in documents:
        found = [next(counted) for _ in _texts(document)]
        if isinstance(document, CompletionDocument):
            encoded.append(_join_segments(document, found, end))
        elif isinstance(document, TokenDocument):
            encoded.append(_join(*_given_ids(tokenizer, document, *found[0]), end))
        else:
            encoded.append(_join(*found[0], len(document), end))
    return encoded


def _texts(document: bytes) -> list[bytes]:
    return [text for text, _ in document.segments] if isinstance(document, CompletionDocument) else [document]


def _join_segments(
    document: CompletionDocument, found: Sequence[tuple[np.ndarray, np.ndarray]], end: int
) -> np.ndarray:
    """Return the tokens of parts that were encoded one by one; the end is trained on where the last part is."""
    ids, lengths = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    tokens = _join(ids, lengths, len(document), end).view(TOKEN)
    learned = np.repeat([learned for _, learned in document.segments], [len(each) for each, _ in found])
    learned = np.append(learned, document.segments[-1][1])
    tokens["bytes"] = np.where(learned, tokens["bytes"], ~tokens["bytes"])
    return tokens.view(np.int64)


def encode_document(tokenizer: Tokenizer, document: bytes) -> np.ndarray:
    """Return the tokens of a document and its end, TOKEN [T]."""
    return encode_documents(tokenizer, [document])[0].view(TOKEN)


def _join(ids: np.ndarray, lengths: np.ndarray, size: int, end: int | None) -> np.ndarray:
    """Return tokens of a text of `size` bytes, and the end of its document."""
    tokens = np.empty(len(ids) + (end is not None), TOKEN)
    tokens["id"][: len(ids)] = ids
    tokens["bytes"][: len(ids)] = lengths
    if end is not None:
        # Text of which the tokenizer keeps nothing is part of the document too.
        tokens[-1] = end, 1 + size - int(lengths.sum())
    return tokens.view(np.int64)


def _given_ids(
    tokenizer: Tokenizer, document: TokenDocument, ids: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return ids that were given, the bytes of each, and the bytes of the document.

    The tokenizer may encode the decoded text with other `ids`, such as where an id is a part of a character: it decodes
    to U+FFFD, which has three bytes. Then each id has the bytes of its own token. Where tokens have no fixed bytes, the
    bytes of the text are shared out evenly.
    """
    size = len(document)
    if not np.array_equal(ids, document.ids):
        own = tokenizer.byte_lengths(document.ids)
        if own is None:
            ends = np.arange(len(document.ids) + 1) * size // max(1, len(document.ids))
            own = np.diff(ends).astype(np.int32)
        lengths, size = own, int(own.sum())
    return document.ids, lengths, size


class EncodeInParts(FlatMapTransform):
    """Turn the number of a document into the tokens of its parts, each of them read when it is asked for."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer):
        """Keep the documents and the tokenizer."""
        self._documents, self._tokenizer = documents, tokenizer

    def flat_map(self, element: int) -> Sequence[dict[str, np.ndarray]]:
        """Return the parts of document `element`."""
        return _Parts(self._documents, self._tokenizer, element)


class _Parts(Sequence[dict[str, np.ndarray]]):
    """The parts of one document; any of them can be had without those before it, so that resuming is quick."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, index: int):
        self._documents, self._tokenizer, self._index = documents, tokenizer, index
        self._size = documents.size(index)
        self._cuts = {0: 0, len(self): self._size}

    def __len__(self) -> int:
        return max(1, -(-self._size // PART_BYTES))

    @overload
    def __getitem__(self, part: int) -> dict[str, np.ndarray]: ...

    @overload
    def __getitem__(self, part: slice) -> Sequence[dict[str, np.ndarray]]: ...

    def __getitem__(self, part: int | slice) -> dict[str, np.ndarray] | Sequence[dict[str, np.ndarray]]:
        if isinstance(part, slice):
            return [self[each] for each in range(*part.indices(len(self)))]
        if not 0 <= part < len(self):
            raise IndexError(part)
        text = self._documents.read_range(self._index, self._cut(part), self._cut(part + 1))
        self._documents.check_utf8(self._index, text, self._cut(part))
        ((ids, lengths),) = self._tokenizer.encode_counted([text])
        end = self._tokenizer.end_of_document if part == len(self) - 1 else None
        return {"tokens": _join(ids, lengths, len(text), end)}

    def _cut(self, part: int) -> int:
        """Return the byte offset at which a part begins: the first one near its place that changes no token."""
        if part not in self._cuts:
            place = part * PART_BYTES
            begin, end = max(0, place - _LEFT_BYTES), min(self._size, place + _RIGHT_BYTES)
            region = self._documents.read_range(self._index, begin, end)
            first = _character_start(region, 0) if begin else 0
            last = _character_start(region, len(region) - 4) if end < self._size else len(region)
            self._documents.check_utf8(self._index, region[first:last], begin + first)
            left = region[first : _character_start(region, place - begin)].decode("utf-8")
            text = region[first:last].decode("utf-8")
            found = self._tokenizer.find_cut(text, len(left))
            if found is None and self._size - place <= _LAST_BYTES:
                found = len(text)  # the end of the document: the last part is empty
            if found is None:
                raise ValueError(self._no_cut(place))
            self._cuts[part] = begin + first + len(text[:found].encode("utf-8"))
        return self._cuts[part]

    def _no_cut(self, place: int) -> str:
        return (
            f"{self._documents.where(self._index)} has {self._size:,} bytes, too many to encode at once, and the "
            f"tokenizer gives other ids wherever it is cut near byte {place:,}; split the file into documents of at "
            f"most {PART_BYTES:,} bytes, at ends of lines with: split -C 4m --additional-suffix=.txt FILE PREFIX"
        )


def _character_start(data: bytes, place: int) -> int:
    """Return the first position from `place` on at which a character begins, within the 4 bytes that one may have."""
    for start in range(place, min(place + 4, len(data))):
        if data[start] & 0xC0 != 0x80:
            return start
    return place
