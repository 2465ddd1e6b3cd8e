"""Documents: a random-access sequence of UTF-8 texts, whichever source they come from."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from transmamba_jax.config import DataConfig
from transmamba_jax.data.tokenizers import Tokenizer, load_tokenizer

PART_BYTES = 2**22
"""Bytes of a document beyond which it is read and encoded in parts, where its source can read parts."""

OPEN_FILES = 128
"""Files that a source keeps open: a process may often have 1,024, and a data set more."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""The mark that programs for Windows put before UTF-8 text. It is no part of the text."""

_SIGNATURES = {
    b"\x1f\x8b": "gzip: unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "Zstandard: unpack it with zstd -d",
    b"PK\x03\x04": "a zip archive: unpack it with unzip",
    b"BZh": "bzip2: unpack it with bunzip2",
    b"\xfd7zXZ": "xz: unpack it with unxz",
    b"\xff\xfe": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"%PDF": "PDF: convert it with pdftotext",
}


def looks_like(data: bytes) -> str:
    """Say what to do with the beginning of a file that is no text, for the end of a message; "" where it is unknown."""
    return next((f"; it looks like {name}" for sign, name in _SIGNATURES.items() if data.startswith(sign)), "")


class Documents:
    """A random-access sequence of UTF-8 documents; subclasses say where a document is and how its bytes are read."""

    def __len__(self) -> int:
        raise NotImplementedError

    def _read(self, index: int) -> bytes:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Name document `index` for a message."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> bytes:
        """Return document `index`.

        Raises:
            ValueError: it cannot be read or is not UTF-8; the message names the file, and the byte offset.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            data = self._read(index)
        except (OSError, RuntimeError) as error:  # array_record raises the latter
            raise ValueError(f"{self.where(index)} cannot be read: {error}") from error
        self.check_utf8(index, data)
        return data

    def check_utf8(self, index: int, data: bytes, offset: int = 0) -> None:
        """Refuse bytes of document `index`, from `offset` on, that are not whole UTF-8 characters.

        Raises:
            ValueError: the message has the byte offset, and the format that the bytes look like.
        """
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{error.reason} at byte offset {offset + error.start} (byte 0x{data[error.start]:02x})"
            hint = looks_like(data) if offset == 0 else ""
            raise ValueError(f"{self.where(index)} is not UTF-8: {message}{hint}") from None

    def record(self, index: int) -> bytes:
        """Return what array_record holds of document `index`: its text, or in JSON the fields that it is made of.

        Raises:
            ValueError: see `__getitem__`.
        """
        return self[index]

    @property
    def skipped_rows(self) -> int:
        """Return the number of broken rows of the source, all splits together, that `data.on_error: skip` left out."""
        return 0

    @property
    def has_long(self) -> bool:
        """Tell whether a document is long enough to be read in parts, which `size` and `read_range` then do."""
        return False

    def size(self, index: int) -> int:
        """Return the bytes of document `index`."""
        raise NotImplementedError

    def read_range(self, index: int, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of document `index`, which need not be whole characters.

        Raises:
            ValueError: they cannot be read.
        """
        raise NotImplementedError

    def head(self, index: int, max_bytes: int) -> bytes:
        """Return document `index`; of one that is read in parts, at most `max_bytes` of whole characters.

        Raises:
            ValueError: see `__getitem__`.
        """
        if not self.has_long or self.size(index) <= max(max_bytes, PART_BYTES):
            return self[index]
        data = cut_text(self.read_range(index, 0, max_bytes + 1), max_bytes)
        self.check_utf8(index, data)
        return data


def cut_text(data: bytes, max_bytes: int) -> bytes:
    """Return the beginning of UTF-8 text that has at most `max_bytes` and ends with a whole character."""
    if len(data) <= max_bytes:
        return data
    stop = max_bytes
    while stop > 0 and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return data[:stop]


class LazyDocuments(Documents):
    """Documents behind a reader that is opened on first use and never pickled: worker processes open their own."""

    def __init__(self) -> None:
        """Leave the reader closed."""
        self._reader: Any = None

    def _open(self) -> Any:
        raise NotImplementedError

    def reader(self) -> Any:
        """Return the open reader."""
        if self._reader is None:
            self._reader = self._open()
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reader."""
        return {**self.__dict__, "_reader": None}


class TokenDocument(bytes):
    """A document of token ids, int32 [T]; its bytes are the text that they decode to."""

    ids: np.ndarray

    def __new__(cls, text: bytes, ids: np.ndarray) -> "TokenDocument":
        """Keep both."""
        document = super().__new__(cls, text)
        document.ids = ids
        return document

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle both."""
        return TokenDocument, (bytes(self), self.ids)


class CompletionDocument(bytes):
    """A document of which parts are trained on, such as a completion, and others are read alone, such as its prompt.

    Its bytes are those of the parts one after another. The parts are encoded one by one, as a prompt is encoded alone
    where text is generated. The end of the document is trained on where its last part is.
    """

    segments: tuple[tuple[bytes, bool], ...]
    """Bytes of each part, and whether it is trained on."""

    @classmethod
    def of(cls, segments: Iterable[tuple[bytes, bool]]) -> "CompletionDocument":
        """Join the parts."""
        parts = tuple(segments)
        document = cls(b"".join(text for text, _ in parts))
        document.segments = parts
        return document

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts."""
        return CompletionDocument.of, (self.segments,)


class GivenDocuments(Documents):
    """Documents that a program gives: any sequence of str, UTF-8 bytes or token ids."""

    def __init__(self, documents: Any, name: str, config: DataConfig):
        """Keep the sequence; `name` stands for it in messages, and token ids are those of the config's tokenizer.

        Raises:
            ValueError: it is one text, or has no length or no items by number.
        """
        if isinstance(documents, str | bytes):
            raise ValueError(f"{name} must be a sequence of documents, found one {type(documents).__name__}")
        methods = [method for method in ("__len__", "__getitem__") if not callable(getattr(documents, method, None))]
        if methods or isinstance(documents, dict | set):
            raise ValueError(
                f"{name} must be a sequence of documents, with len(documents) and documents[i], found "
                f"{type(documents).__name__}; list(...) makes one of an iterator"
            )
        if hasattr(documents, "iloc"):  # pandas: documents[i] is the row with the label i
            raise ValueError(
                f"{name} must be a sequence of documents, found a pandas {type(documents).__name__}; give the column "
                "of texts as a list: frame['text'].tolist()"
            )
        self._documents, self._name, self._config = documents, name, config

    def __len__(self) -> int:
        return len(self._documents)

    def where(self, index: int) -> str:
        """Name the document by its number."""
        return f"document {index} of {self._name}"

    def _read(self, index: int) -> bytes:
        try:
            document = self._documents[index]
        except (LookupError, TypeError) as error:
            raise ValueError(f"{self.where(index)} cannot be read: {type(error).__name__}: {error}") from error
        if isinstance(document, str):
            try:
                return document.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{self.where(index)} is no Unicode text: {error.reason} at {error.start}") from None
        if isinstance(document, bytes):
            return document
        return bytes(document) if isinstance(document, bytearray | memoryview) else self._read_ids(index, document)

    def _read_ids(self, index: int, document: Any) -> TokenDocument:
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                f"{self.where(index)} must be str, bytes or a list of token ids, found {type(document).__name__}"
                + (f" of {ids.dtype} {list(ids.shape)}" if ids.ndim else "")
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self._tokenizer.vocab_size:
            raise ValueError(
                f"{self.where(index)} has token ids from {ids.min()} to {ids.max()}, but those of data.tokenizer "
                f"{self._config.tokenizer!r} are 0 to {self._tokenizer.vocab_size - 1}; name the one that made them"
            )
        return TokenDocument(self._tokenizer.decode(ids.tolist()).encode("utf-8"), ids.astype(np.int32))

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._config.tokenizer, self._config.end_of_document)


def take(documents: Documents, max_bytes: int, stride: int = 1) -> Iterator[bytes]:
    """Yield every `stride`-th document in order, the last one being that which reaches `max_bytes`.

    A document that is read in parts is cut there.
    """
    taken = 0
    for index in range(0, len(documents), stride):
        document = documents.head(index, max_bytes - taken)
        taken += len(document)
        yield document
        if taken >= max_bytes:
            return
