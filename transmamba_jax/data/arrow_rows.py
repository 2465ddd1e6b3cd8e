"""The sources `parquet:<glob>` and `hf:<folder>`, read by pyarrow.

Parquet keeps rows in compressed groups, which cannot be read at random: the fields that are needed are written once, a
row group at a time, as lines of JSON into the cache. A Hugging Face data set that was saved to disk is Arrow, whose
rows are read in place, through a memory map.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from transmamba_jax.config import DataConfig
from transmamba_jax.data.cache_folder import cache_folder
from transmamba_jax.data.documents import Documents
from transmamba_jax.data.fields import Fields, RowError
from transmamba_jax.data.file_patterns import find_files
from transmamba_jax.data.json_rows import JsonRows, numbers_of_split
from transmamba_jax.data.row_index import IndexedRows, RowWriter, open_index
from transmamba_jax.data.splits import SPLITS, require_name
from transmamba_jax.runtime.paths import expand_path, show_path

_BATCH_ROWS = 1024


def open_parquet(config: DataConfig, pattern: str, split: str) -> Documents:
    """Return the rows of one split: of every 20 valid ones, number 9 is for validation and number 19 for test.

    Raises:
        ValueError: no file matches, one is no Parquet file, a row is broken, or the split is unknown or has no row.
    """
    require_name("split", split, (*SPLITS, "all"), f"of data.source='{show_path(config.source)}'")
    paths, fields = list(find_files("parquet", pattern)), Fields.of(config)
    index = open_index(cache_folder(config), "parquet", paths, fields, config.on_error == "skip", _scan_parquet)
    return JsonRows(index, fields, numbers_of_split(config, split, index.rows, "rows"), "row", first=0)


def _scan_parquet(writer: RowWriter, path: str, progress: tqdm) -> None:
    """Copy the fields of a file's rows into lines of an index.

    Raises:
        ValueError: it is no Parquet file or damaged, has not these fields, or a row is broken and not to be skipped.
    """
    names, size, done = writer.fields.names, os.path.getsize(path), 0
    with _damage_is_reported(path):
        file = pyarrow.parquet.ParquetFile(path)
    with file, open(writer.begin(path, copied=True), "wb") as copy:
        _require_fields(writer.fields, path, file.schema_arrow)
        offset = 0
        for number, row in enumerate(_parquet_rows(path, file, names)):
            line = b"\n"  # of a broken row: the number of a line is that of its row
            if _checked(writer, path, number, row) is not None:
                line = json.dumps(writer.fields.kept(row), ensure_ascii=False).encode() + line
                writer.add(offset, len(line), len(line))
            copy.write(line)
            offset += len(line)
            if number % _BATCH_ROWS == 0:
                progress.update(size * number // file.metadata.num_rows - done)
                done = size * number // file.metadata.num_rows
    progress.update(size - done)


def _parquet_rows(path: str, file: pyarrow.parquet.ParquetFile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    with _damage_is_reported(path):
        yield from _rows(file.iter_batches(_BATCH_ROWS, columns=names), names)


@contextlib.contextmanager
def _damage_is_reported(path: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:  # pyarrow raises the latter for pages that do not unpack
        raise ValueError(f"{show_path(path)} cannot be read as Parquet: {error}") from None


def open_hf(config: DataConfig, folder: str, split: str) -> Documents:
    """Return the rows of one split of a data set that Hugging Face's `save_to_disk` wrote.

    A folder of several splits has its own; of a single one, every 20 valid rows have one for validation and test each.

    Raises:
        ValueError: the folder is none, a row is broken, or the split is unknown or has no row.
    """
    root, fields = expand_path(folder), Fields.of(config)
    splits = _own_splits(root)
    if splits:
        one = f"'hf:{show_path(root / splits[0])}' is split {splits[0]!r} alone, cut into train, validation and test"
        require_name("split", split, splits, f"of data.source='{show_path(config.source)}' ({one})")
        root = root / split
    else:
        require_name("split", split, (*SPLITS, "all"), f"of data.source='{show_path(config.source)}'")
    paths = _arrow_files(config.source, root)
    index = open_index(cache_folder(config), "hf", paths, fields, config.on_error == "skip", _scan_arrow)
    numbers = numbers_of_split(config, "all" if splits else split, index.rows, "rows")
    return ArrowRows(index, fields, numbers, "row", first=0)


def _own_splits(root: Path) -> list[str]:
    """Return the splits of a folder that has several data sets."""
    description = root / "dataset_dict.json"
    return _listed(description, "splits") if description.is_file() else []


def _arrow_files(source: str, root: Path) -> list[str]:
    """Return the files of a data set in the order of their rows.

    Raises:
        ValueError: `root` is no data set that was saved to disk, or a file is missing.
    """
    state = root / "state.json"
    if not state.is_file():
        others = sorted(str(path) for path in root.glob("**/*.parquet"))
        way = f"; for its Parquet files write 'parquet:{show_path(root)}/**/*.parquet'" if others else ""
        there = "it has no state.json" if root.is_dir() else "there is no such folder"
        raise ValueError(
            f"data.source '{show_path(source)}' must be a folder that save_to_disk of Hugging Face datasets wrote; "
            f"{there}{way}"
        )
    paths = [str(root / file["filename"]) for file in _listed(state, "_data_files")]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"data.source '{show_path(source)}': {len(missing)} of its files are missing, {show_path(missing[0])}"
        )
    return paths


def _listed(path: Path, name: str) -> list[Any]:
    """Read the list called `name` of a description."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the description {show_path(path)} cannot be read: {error}") from None
    if not isinstance(found, dict) or name not in found or not isinstance(found[name], list):
        raise ValueError(f"the description {show_path(path)} must have a list {name!r}; save the data set again")
    return list(found[name])


@dataclasses.dataclass(frozen=True)
class ArrowFile:
    """Record batches of a file, in its memory map, and the number of the first row of each."""

    batches: list[pyarrow.RecordBatch]
    starts: list[int]

    @classmethod
    def open(cls, path: str) -> "ArrowFile":
        """Open a stream of record batches.

        Raises:
            OSError: it cannot be read as one.
        """
        try:
            batches = list(pyarrow.ipc.open_stream(pyarrow.memory_map(path)))
        except pyarrow.ArrowException as error:
            raise OSError(f"{show_path(path)} is no stream of Arrow record batches, or damaged: {error}") from None
        return cls(batches, list(itertools.accumulate((len(each) for each in batches), initial=0)))


class ArrowRows(IndexedRows[ArrowFile]):
    """Rows of an index whose places are the number of a record batch and that of a row in it."""

    def _open_file(self, path: str) -> ArrowFile:
        return ArrowFile.open(path)

    def _number(self, position: int, place: tuple[int, int]) -> int:
        return self._file(position).starts[place[0]] + place[1]

    def _row(self, file: ArrowFile, place: tuple[int, int]) -> dict[str, Any]:
        batch, row = file.batches[place[0]], place[1]
        return {name: _value(batch.column(name), row) for name in self._fields.names}


def _scan_arrow(writer: RowWriter, path: str, progress: tqdm) -> None:
    """Check the rows of a file for an index.

    Raises:
        ValueError: it has not these fields, or a row is broken and not to be skipped.
    """
    names, size = writer.fields.names, os.path.getsize(path)
    writer.begin(path, copied=False)
    try:
        file = ArrowFile.open(path)
    except OSError as error:
        raise ValueError(str(error)) from None
    if file.batches:
        _require_fields(writer.fields, path, file.batches[0].schema)
    for number, (batch, start) in enumerate(zip(file.batches, file.starts, strict=False)):
        for row, values in enumerate(_rows(iter([batch]), names)):
            document = _checked(writer, path, start + row, values)
            if document is not None:
                writer.add(number, row, len(document))
        progress.update(size // len(file.batches))


def _require_fields(fields: Fields, path: str, schema: pyarrow.Schema) -> None:
    try:
        fields.require(schema.names)
    except RowError as error:
        raise ValueError(f"{show_path(path)} {error}") from None


def _checked(writer: RowWriter, path: str, number: int, row: dict[str, Any]) -> bytes | None:
    """Return the document of a row, None where it is broken and left out."""
    try:
        return writer.fields.document(row)
    except RowError as error:
        writer.broken(f"row {number} of {show_path(path)}", error)
        return None


def _rows(batches: Iterable[pyarrow.RecordBatch], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for values in zip(*(_values(batch.column(name)) for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: pyarrow.Array) -> list[Any]:
    """Return the values of a column."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(column, index) for index in range(len(column))]


def _value(column: pyarrow.Array, index: int) -> Any:
    """Return a value of a column; text that is not UTF-8 as None, of which no document is made."""
    try:
        return column[index].as_py()
    except UnicodeDecodeError:
        return None
