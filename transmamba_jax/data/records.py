"""The source `array_record:<glob>`: a record is a document, or an object in JSON. TFDS data sets are records too."""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Sequence

from array_record.python import array_record_module

from transmamba_jax.config import DataConfig
from transmamba_jax.data.documents import OPEN_FILES, Documents, LazyDocuments
from transmamba_jax.data.fields import Fields, RowError, parse_json
from transmamba_jax.data.file_patterns import find_files
from transmamba_jax.data.splits import SPLITS, RecordNumbers, records_of_split, require_name, too_few
from transmamba_jax.runtime.paths import show_path


@dataclasses.dataclass(frozen=True)
class RecordRange:
    """Consecutive records of one array_record file."""

    path: str
    start: int
    count: int


class Records(LazyDocuments):
    """Records of array_record files, each of them one document."""

    def __init__(self, ranges: Sequence[RecordRange], numbers: RecordNumbers | range):
        """Take those records whose number, counted through `ranges` in order, is in `numbers`."""
        super().__init__()
        self._ranges = list(ranges)
        self._starts = list(itertools.accumulate((each.count for each in ranges[:-1]), initial=0))
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        """Name the file and the record in it."""
        position, record = self._locate(index)
        return f"record {record} of {show_path(self._ranges[position].path)}"

    def _locate(self, index: int) -> tuple[int, int]:
        number = self._numbers[index]
        position = bisect.bisect_right(self._starts, number) - 1
        return position, self._ranges[position].start + number - self._starts[position]

    def _open(self) -> dict[str, array_record_module.ArrayRecordReader]:
        return {}

    def _read(self, index: int) -> bytes:
        position, record = self._locate(index)
        path, readers = self._ranges[position].path, self.reader()
        if path not in readers:
            if len(readers) >= OPEN_FILES:
                readers.pop(next(iter(readers))).close()
            readers[path] = _open_reader(path)
        # A range, not a list: read([i]) takes time in proportion to the records of the whole file.
        (data,) = readers[path].read(record, record + 1)
        return data


class FieldRecords(Records):
    """Records that are objects in JSON, whose fields make a prompt and its completion, or a chat."""

    def __init__(self, ranges: Sequence[RecordRange], numbers: RecordNumbers | range, fields: Fields):
        """Take records as `Records` does."""
        super().__init__(ranges, numbers)
        self._fields = fields

    def _read(self, index: int) -> bytes:
        try:
            return self._fields.document(parse_json(super()._read(index)))
        except RowError as error:
            raise ValueError(f"{self.where(index)} {error}") from None

    def record(self, index: int) -> bytes:
        """Return the record as it is."""
        return super()._read(index)


def open_records(config: DataConfig, pattern: str, split: str) -> Documents:
    """Return the records of one split: of every 20 records one is for validation and one for test.

    Raises:
        ValueError: no file matches, one is no complete array_record file, or the split is unknown or has no record.
    """
    require_name("split", split, (*SPLITS, "all"), f"of data.source='{show_path(config.source)}'")
    ranges = [RecordRange(path, 0, _count_records(path)) for path in find_files("array_record", pattern)]
    count = sum(each.count for each in ranges)
    numbers = records_of_split(count, split)
    if len(numbers) == 0:
        counts = {each: len(records_of_split(count, each)) for each in SPLITS}
        raise ValueError(too_few(config, split, "records", counts))
    if config.completions_only:
        return FieldRecords(ranges, numbers, Fields.of(config))
    return Records(ranges, numbers)


def _count_records(path: str) -> int:
    try:
        return _open_reader(path).num_records()
    except OSError as error:
        raise ValueError(
            f"data.source 'array_record:' cannot read a single record of {show_path(path)}: {error}"
        ) from None


def _open_reader(path: str) -> array_record_module.ArrayRecordReader:
    with open(path, "rb"):  # a file that is missing, forbidden or one too many says so here, and nothing below
        pass
    reader = array_record_module.ArrayRecordReader(os.fsencode(path))  # bytes: the name need not be UTF-8
    if not reader.ok():  # it says no more, and has 0 records
        raise OSError("it is no array_record file, or cut off")
    return reader
