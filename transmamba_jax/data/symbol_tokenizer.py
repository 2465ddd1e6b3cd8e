"""The tokenizer of synthetic tasks."""

import json
import re
from collections.abc import Sequence

import numpy as np


class SymbolTokenizer:
    """The ids of a synthetic task, written as numbers with spaces between them."""

    end_of_document = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

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

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each text and the bytes of each number with the spaces before it, int32 [T] both."""
        return [self._counted(text) for text in texts]

    def _counted(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(self.encode(text.decode()), np.int32)
        ends = np.array([match.end() for match in re.finditer(rb"\d+", text)], np.int32)
        ends[-1:] = len(text)
        return ids, np.diff(ends, prepend=np.int32(0))

    def byte_lengths(self, ids: np.ndarray) -> None:
        """Return None: a number is written with the space before it."""

    def find_cut(self, text: str, start: int) -> int | None:
        """Return the place of the first space from `start` on."""
        place = text.find(" ", start)
        return None if place < 0 else place

    def decode(self, ids: Sequence[int]) -> str:
        """Write ids as numbers; those from `vocab_size` on, which a padded vocabulary has, are left out."""
        return " ".join(str(int(token)) for token in ids if 0 <= token < self.vocab_size)

    def decode_stable(self, ids: Sequence[int]) -> str:
        """Write ids as numbers: what stands there stays."""
        return self.decode(ids)

    def to_json(self) -> str:
        """Return a text that `tokenizer_from_json` reads back."""
        return json.dumps({"tokenizer": "symbols", "vocab_size": self.vocab_size})
