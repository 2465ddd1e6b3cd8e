"""An index of the rows of files, which is built once in the cache folder and makes any row readable by itself.

Building it reads every row once and refuses, or skips, those that no document can be made of. An index is a folder:
`places.int64` has two numbers of each row, read through a memory map, and `index.json` has the rest. Rows of compressed
files are copied into the folder, as lines of JSON.
"""

import array
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from transmamba_jax.data.cache_folder import locked
from transmamba_jax.data.documents import OPEN_FILES, PART_BYTES, LazyDocuments
from transmamba_jax.data.fields import Fields, RowError
from transmamba_jax.data.splits import RecordNumbers
from transmamba_jax.runtime.paths import show_path

VERSION = 1
"""Part of the name of an index: raised where what it holds changes."""

_FLUSH_NUMBERS = 2**20
_LOG = logging.getLogger(__name__)

File = TypeVar("File")
"""An open file of the source, of whatever type its rows are read from."""


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Places of the valid rows of some files."""

    folder: Path
    files: tuple[str, ...]
    """Files that rows are read from: the source's own, or their copies in the folder."""
    names: tuple[str, ...]
    """The source's files."""
    starts: tuple[int, ...]
    """Number of the first row of each file."""
    rows: int
    skipped: int
    """Broken rows that were left out."""
    longest: int
    """Bytes of the longest row, at least those of its document."""

    def places(self) -> np.ndarray:
        """Return two numbers of each row, int64 [rows, 2], memory-mapped: what they are is up to the kind of file."""
        if self.rows == 0:
            return np.zeros((0, 2), np.int64)
        return np.memmap(self.folder / "places.int64", np.int64, "r", shape=(self.rows, 2))


class RowWriter:
    """Collects the places of the rows of an index that is being built, file after file."""

    def __init__(self, folder: Path, fields: Fields, skip: bool) -> None:
        """Write into `folder`; a broken row is skipped, or ends the building."""
        self.folder, self.fields = folder, fields
        self.rows = self.skipped = self.longest = 0
        self.first_skipped: str | None = None
        self.names, self.files, self.starts = list[str](), list[str](), list[int]()
        self._skip, self._numbers = skip, array.array("q")
        self._file = open(folder / "places.int64", "wb")  # noqa: SIM115 (closed by `close`)

    def begin(self, name: str, copied: bool) -> Path:
        """Begin a file; return the path that its rows are read from, which is one in the folder for a copy."""
        path = self.folder / f"{len(self.files)}.jsonl" if copied else Path(name)
        self.names.append(name)
        self.files.append(path.name if copied else name)
        self.starts.append(self.rows)
        return path

    def add(self, first: int, second: int, size: int) -> None:
        """Take the two numbers of a valid row that has at least as many bytes as its document."""
        self._numbers.append(first)
        self._numbers.append(second)
        self.rows += 1
        self.longest = max(self.longest, size)
        if len(self._numbers) >= _FLUSH_NUMBERS:
            self._flush()

    def broken(self, where: str, error: RowError) -> None:
        """Count a broken row.

        Raises:
            ValueError: broken rows are not to be skipped.
        """
        message = f"{where} {error}"
        if not self._skip:
            raise ValueError(f"{message} (--data.on-error skip leaves such rows out and counts them)")
        self.skipped += 1
        if self.first_skipped is None:
            self.first_skipped = message

    def close(self) -> None:
        """Write the rest of the places."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        self._numbers.tofile(self._file)
        self._numbers = array.array("q")


Scan = Callable[[RowWriter, str, tqdm], None]
"""(where places go, file, progress bar in bytes of the file): read all rows of one file."""


def open_index(cache: Path, kind: str, paths: Sequence[str], fields: Fields, skip: bool, scan: Scan) -> RowIndex:
    """Return the index of these files, building it where the cache has none of files of this size and time.

    Processes that come at the same time wait for the first one; what a killed one left behind is removed.

    Raises:
        ValueError: a row is broken and not to be skipped, every row is broken, or files or cache cannot be used.
    """
    try:
        facts = [(os.path.realpath(path), *_size_and_time(path)) for path in paths]
        key = json.dumps([VERSION, kind, facts, dataclasses.astuple(fields), skip])
        folder = cache / "rows" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        if not (folder / "index.json").exists():
            with locked(folder.with_suffix(".lock")):
                if not (folder / "index.json").exists():
                    _build(folder, kind, paths, functools.partial(RowWriter, fields=fields, skip=skip), scan)
        return _load(folder, paths)
    except OSError as error:
        raise ValueError(
            f"data.source '{kind}:' cannot be indexed in data.cache_dir '{show_path(cache)}': {error}"
        ) from error


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _build(folder: Path, kind: str, paths: Sequence[str], make_writer: Callable[[Path], RowWriter], scan: Scan) -> None:
    partial = folder.with_suffix(".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    writer = make_writer(partial)
    total = sum(os.path.getsize(path) for path in paths)
    bar = functools.partial(tqdm, desc=f"indexing {kind}", unit="B", unit_scale=True, delay=1.0, disable=None)
    try:
        with contextlib.closing(writer), bar(total=total, leave=False) as progress:
            for path in paths:
                scan(writer, path, progress)
        if writer.rows == 0 and writer.first_skipped is not None:
            raise ValueError(
                f"data.source '{kind}:' has {writer.skipped} rows, all of them broken: {writer.first_skipped}"
            )
        names = ("names", "files", "starts", "rows", "skipped", "longest", "first_skipped")
        text = json.dumps({name: getattr(writer, name) for name in names})
        (partial / "index.json").write_text(text, encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@functools.cache  # once, however many splits are opened
def _warn(message: str) -> None:
    _LOG.warning(message)


def _load(folder: Path, paths: Sequence[str]) -> RowIndex:
    """Read an index. Copies are in its folder; the source's own files are those of now, by whatever path."""
    found = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if found["skipped"]:
        _warn(f"{found['skipped']} of {found['rows'] + found['skipped']} rows are skipped: {found['first_skipped']}")
    copied = [file != name for file, name in zip(found["files"], found["names"], strict=True)]
    files = [
        str(folder / file) if is_copy else path
        for file, path, is_copy in zip(found["files"], paths, copied, strict=True)
    ]
    return RowIndex(
        folder, tuple(files), tuple(paths), tuple(found["starts"]), found["rows"], found["skipped"], found["longest"]
    )


class IndexedRows(LazyDocuments, Generic[File]):
    """Documents of an index's rows; subclasses say how a file is opened and a row of it read."""

    def __init__(self, index: RowIndex, fields: Fields, numbers: RecordNumbers, row_name: str, first: int) -> None:
        """Take the rows in `numbers`; messages call the rows of a file `row_name`, from `first` on."""
        super().__init__()
        self._index, self._fields, self._numbers = index, fields, numbers
        self._row_name, self._first = row_name, first

    def _open_file(self, path: str) -> File:
        raise NotImplementedError

    def _row(self, file: File, place: tuple[int, int]) -> Any:
        """Read the row at a place of the index."""
        raise NotImplementedError

    def _number(self, position: int, place: tuple[int, int]) -> int:
        """Return the number of rows of the file before that at a place."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def skipped_rows(self) -> int:
        """Return the number of rows that the index left out."""
        return self._index.skipped

    def where(self, index: int) -> str:
        """Name the row and its file."""
        position, place = self._locate(index)
        name = f"of {show_path(self._index.names[position])}"
        try:
            number = self._number(position, place)
        except OSError:  # the reason of the message
            return f"a {self._row_name} {name}"
        return f"{self._row_name} {number + self._first} {name}"

    def _open(self) -> "_Reader[File]":
        return _Reader(self._index.places())

    def _locate(self, index: int) -> tuple[int, tuple[int, int]]:
        number = self._numbers[index]
        first, second = self.reader().places[number]
        return bisect.bisect_right(self._index.starts, number) - 1, (int(first), int(second))

    def _file(self, position: int) -> File:
        files: dict[int, File] = self.reader().files
        if position not in files:
            if len(files) >= OPEN_FILES:
                files.pop(next(iter(files)))  # closed with its last reference
            files[position] = self._open_file(self._index.files[position])
        return files[position]

    def _read(self, index: int) -> bytes:
        position, place = self._locate(index)
        try:
            return self._fields.document(self._row(self._file(position), place))
        except RowError as error:
            raise OSError(f"it {error}; the file was changed since it was indexed") from None

    def record(self, index: int) -> bytes:
        """Return the text of document `index`, or in JSON the fields of its prompt and completion, or its chat.

        Raises:
            ValueError: see `__getitem__`.
        """
        document = self[index]
        if not self._fields.completions_only:
            return document
        position, place = self._locate(index)
        row = self._fields.kept(self._row(self._file(position), place))
        return json.dumps(row, ensure_ascii=False).encode()

    @property
    def has_long(self) -> bool:
        """Tell whether a text may have more than PART_BYTES; one with a prompt is read as a whole."""
        return self._index.longest > PART_BYTES and not self._fields.completions_only

    def size(self, index: int) -> int:
        """Return the bytes of the document."""
        return len(self._whole(index))

    def read_range(self, index: int, start: int, stop: int) -> bytes:
        """Return a part of the document.

        Raises:
            ValueError: it cannot be read.
        """
        return self._whole(index)[start:stop]

    def _whole(self, index: int) -> bytes:
        """Return the document that was read last, or read it: its parts are asked for one after another."""
        reader: _Reader[File] = self.reader()
        if reader.last is None or reader.last[0] != index:
            reader.last = index, self[index]
        return reader.last[1]


@dataclasses.dataclass
class _Reader(Generic[File]):
    """Open things of a process that reads an index."""

    places: np.ndarray
    files: dict[int, File] = dataclasses.field(default_factory=dict)
    """By position."""
    last: tuple[int, bytes] | None = None
    """Document that was read in parts last."""
