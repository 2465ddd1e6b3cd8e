"""The source `jsonl:<glob>`: a line is a row; also the reader of rows that an index keeps as lines of JSON."""

import contextlib
import gzip
import io
import os
import weakref
import zlib
from collections.abc import Iterator
from typing import IO, Any

from tqdm import tqdm

from transmamba_jax.config import DataConfig
from transmamba_jax.data.cache_folder import cache_folder
from transmamba_jax.data.documents import Documents
from transmamba_jax.data.fields import Fields, RowError, parse_json
from transmamba_jax.data.file_patterns import find_files
from transmamba_jax.data.row_index import IndexedRows, RowWriter, open_index
from transmamba_jax.data.splits import SPLITS, RecordNumbers, records_of_split, require_name, too_few
from transmamba_jax.runtime.paths import show_path

_LINES_PER_UPDATE = 1024
_CHUNK_BYTES = 2**20


class LineFile:
    """A file that lines are read from by their places; it is closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        """Open it for reading."""
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes.

        Raises:
            OSError: there are fewer.
        """
        line = os.pread(self._descriptor, size, offset)
        if len(line) < size:
            raise OSError("the file became shorter than it was when it was indexed")
        return line


class JsonRows(IndexedRows[LineFile]):
    """Rows of an index whose places are offset and length of a line of JSON."""

    def _open_file(self, path: str) -> LineFile:
        return LineFile(path)

    def _number(self, position: int, place: tuple[int, int]) -> int:
        return _count_lines(self._index.files[position], place[0])

    def _row(self, file: LineFile, place: tuple[int, int]) -> Any:
        return parse_json(file.read(*place))


def open_jsonl(config: DataConfig, pattern: str, split: str) -> Documents:
    """Return the lines of one split: of every 20 valid ones, number 9 is for validation and 19 for test.

    Raises:
        ValueError: no file matches, a line is broken, or the split is unknown or has no line.
    """
    require_name("split", split, (*SPLITS, "all"), f"of data.source='{show_path(config.source)}'")
    paths, fields = list(find_files("jsonl", pattern)), Fields.of(config)
    index = open_index(cache_folder(config), "jsonl", paths, fields, config.on_error == "skip", scan_lines)
    return JsonRows(index, fields, numbers_of_split(config, split, index.rows, "lines"), "line", first=1)


def numbers_of_split(config: DataConfig, split: str, rows: int, what: str) -> RecordNumbers:
    """Return the numbers of the rows of a split of `rows`.

    Raises:
        ValueError: there is none.
    """
    numbers = records_of_split(rows, split)
    if len(numbers) == 0:
        raise ValueError(too_few(config, split, what, {each: len(records_of_split(rows, each)) for each in SPLITS}))
    return numbers


def scan_lines(writer: RowWriter, path: str, progress: tqdm) -> None:
    """Add the lines of a file to an index; those of a compressed one are copied.

    Raises:
        ValueError: a line is broken and not to be skipped, or the compressed file is damaged.
    """
    compressed = path.lower().endswith((".gz", ".zst"))
    place, number, offset = writer.begin(path, copied=compressed), 0, 0
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(path, "rb"))
        copy = stack.enter_context(open(place, "wb")) if compressed else None
        done = 0
        try:
            for number, line in enumerate(_lines(path, raw), start=1):
                if copy is not None:
                    copy.write(line)
                if not line.isspace():
                    _add(writer, path, number, offset, line)
                offset += len(line)
                if number % _LINES_PER_UPDATE == 0:
                    progress.update(raw.tell() - done)
                    done = raw.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{show_path(path)} is damaged behind line {number}: {error}") from None
        progress.update(os.path.getsize(path) - done)


def _add(writer: RowWriter, path: str, number: int, offset: int, line: bytes) -> None:
    try:
        writer.fields.document(parse_json(line))
    except RowError as error:
        writer.broken(f"line {number} of {show_path(path)}", error)
    else:
        writer.add(offset, len(line), len(line))


def _lines(path: str, raw: IO[bytes]) -> Iterator[bytes]:
    if path.lower().endswith(".gz"):
        yield from gzip.GzipFile(fileobj=raw)
    elif path.lower().endswith(".zst"):
        yield from _zstd_lines(raw)
    else:
        yield from raw


def _zstd_lines(raw: IO[bytes]) -> Iterator[bytes]:
    import pyarrow  # a third of a second that other files do not need

    try:
        with pyarrow.CompressedInputStream(raw, "zstd") as stream:
            yield from io.BufferedReader(stream, _CHUNK_BYTES)
    except OSError as error:
        raise EOFError(str(error)) from None


def _count_lines(path: str, stop: int) -> int:
    """Return the number of line ends before byte `stop`."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (chunk := file.read(min(stop, _CHUNK_BYTES))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count
