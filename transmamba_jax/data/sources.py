"""Sources: every kind of corpus as a random-access sequence of UTF-8 documents.

A source opens its files when the first document is asked for and is pickled without them, so that worker processes
get their own handles. Only this module and `stdlib_dataset` know TFDS.
"""

import bisect
import difflib
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from transmamba_jax.config import DataConfig
from transmamba_jax.data import prepared
from transmamba_jax.data.splits import SPLITS, records_of_split, split_of

DEFAULT_CACHE = "~/.cache/transmamba_jax"


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
        try:
            data = self._read(index)
        except (OSError, RuntimeError) as error:  # array_record raises the latter
            raise ValueError(f"{self.where(index)} cannot be read: {error}") from error
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.where(index)} is not UTF-8: {error.reason} at byte offset {error.start} "
                f"(byte 0x{data[error.start]:02x})"
            ) from None
        return data


class TextFiles(Documents):
    """Files, each of them one document."""

    def __init__(self, paths: Sequence[str]):
        """Take the files in the given order."""
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        """Name the file."""
        return self._paths[index]

    def _read(self, index: int) -> bytes:
        return Path(self._paths[index]).read_bytes()


class _Lazy(Documents):
    """Documents behind a reader that is opened on first use and never pickled."""

    def __init__(self) -> None:
        self._reader: Any = None

    def _open(self) -> Any:
        raise NotImplementedError

    def reader(self) -> Any:
        """Return the open reader."""
        if self._reader is None:
            self._reader = self._open()
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class Records(_Lazy):
    """Records of array_record files, each of them one document."""

    def __init__(self, paths: Sequence[str], split: str):
        """Take the files in the given order, and of their records those of `split`.

        Raises:
            ValueError: a file is no array_record file, or not a whole one.
        """
        super().__init__()
        self._paths = list(paths)
        counts = [_count_records(path) for path in self._paths]
        self._starts = [sum(counts[:file]) for file in range(len(counts))]
        self._numbers = records_of_split(sum(counts), split)

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        """Name the file and the record in it."""
        file, record = self._locate(index)
        return f"record {record} of {self._paths[file]}"

    def _locate(self, index: int) -> tuple[int, int]:
        number = self._numbers[index]
        file = bisect.bisect_right(self._starts, number) - 1
        return file, number - self._starts[file]

    def _open(self) -> dict[int, array_record_module.ArrayRecordReader]:
        return {}

    def _read(self, index: int) -> bytes:
        file, record = self._locate(index)
        readers = self.reader()
        if file not in readers:
            readers[file] = array_record_module.ArrayRecordReader(self._paths[file])
        (data,) = readers[file].read([record])
        return data


def _count_records(path: str) -> int:
    reader = array_record_module.ArrayRecordReader(path)
    if not reader.ok():  # it says no more, and has 0 records
        raise ValueError(
            f"data.source 'array_record:' cannot read a single record of {path}: it is no array_record file, or cut off"
        )
    return reader.num_records()


class TfdsDocuments(_Lazy):
    """One text feature of one split of a data set that TFDS prepared in array_record."""

    def __init__(self, directory: Path, split: str, field: str):
        """Open the split.

        Raises:
            ValueError: the data set has no such split or no such text feature, or lacks shards of the split.
        """
        super().__init__()
        self._directory, self._split, self._field = directory, split, field
        self._length = len(self.reader())

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        """Name the example and the directory."""
        return f"example {index} of split {self._split!r} in {self._directory}"

    def _open(self) -> Any:
        import tensorflow_datasets as tfds  # a second of import that the other sources do not need

        builder = tfds.builder_from_directory(self._directory)
        for part in self._split.split("+"):
            name = part.partition("[")[0].strip()
            _require_name("split", name, list(builder.info.splits), f"of {self._directory}")
            _require_shards(name, builder.info.splits[name].filepaths)
        _require_name("data.text_field", self._field, sorted(builder.info.features), f"in {self._directory}")
        return builder.as_data_source(split=self._split)

    def _read(self, index: int) -> bytes:
        value = self.reader()[index][self._field]
        if not isinstance(value, bytes):
            raise ValueError(f"data.text_field {self._field!r} is not text, {self.where(index)} has {value!r}")
        return value


def open_documents(config: DataConfig, split: str) -> Documents:
    """Return the documents of one split of the configured source.

    Raises:
        ValueError: the source or the split does not exist or is empty; the message says what there is.
    """
    kind, _, rest = config.source.partition(":")
    documents = _OPENERS[kind](config, rest, split)
    if len(documents) == 0:
        raise ValueError(f"split {split!r} of data.source {config.source!r} has no documents")
    return documents


def take(documents: Documents, max_bytes: int, stride: int = 1) -> Iterator[bytes]:
    """Yield every `stride`-th document in order, the last one being that which reaches `max_bytes`."""
    taken = 0
    for index in range(0, len(documents), stride):
        document = documents[index]
        taken += len(document)
        yield document
        if taken >= max_bytes:
            return


def _open_stdlib(config: DataConfig, _: str, split: str) -> Documents:
    _require_name("split", split, SPLITS, "of data.source='stdlib'")
    from transmamba_jax.data import stdlib_dataset  # imports TFDS

    cache = Path(DEFAULT_CACHE if config.cache_dir is None else config.cache_dir).expanduser()
    try:
        directory = stdlib_dataset.prepare(cache)
    except OSError as error:
        raise ValueError(
            f"data.source 'stdlib' cannot be prepared in data.cache_dir {str(cache)!r}: {error}"
        ) from error
    return TfdsDocuments(directory, split, "text")


def _open_tfds(config: DataConfig, spec: str, split: str) -> Documents:
    root = prepared.default_root() if config.cache_dir is None else Path(config.cache_dir).expanduser()
    return TfdsDocuments(prepared.find(spec, root).directory, split, config.text_field)


def _open_text(config: DataConfig, pattern: str, split: str) -> Documents:
    _require_name("split", split, (*SPLITS, "all"), f"of data.source={config.source!r}")
    paths = _matches(config.source, pattern)
    root = _fixed_part(pattern)
    names = {path: os.path.relpath(path, root).replace(os.sep, "/") for path in paths}
    chosen = [path for path in paths if split in ("all", split_of(names[path]))]
    if not chosen:
        counts = {each: sum(split_of(name) == each for name in names.values()) for each in SPLITS}
        raise ValueError(_too_few(config, split, "files", counts))
    return TextFiles(chosen)


def _open_records(config: DataConfig, pattern: str, split: str) -> Documents:
    _require_name("split", split, (*SPLITS, "all"), f"of data.source={config.source!r}")
    paths = _matches(config.source, pattern)
    documents = Records(paths, split)
    if len(documents) == 0:
        raise ValueError(_too_few(config, split, "records", {each: len(Records(paths, each)) for each in SPLITS}))
    return documents


_OPENERS: dict[str, Callable[[DataConfig, str, str], Documents]] = {
    "stdlib": _open_stdlib,
    "text": _open_text,
    "tfds": _open_tfds,
    "array_record": _open_records,
}


def _matches(source: str, pattern: str) -> list[str]:
    paths = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
    if not paths:
        raise ValueError(f"data.source {source!r} matches no file (searched from {os.getcwd()})")
    return paths


def _fixed_part(pattern: str) -> str:
    """Return the directory above the first wildcard: names below it decide the split, wherever the corpus lies."""
    parts = Path(os.path.expanduser(pattern)).parts
    fixed = [*parts[:-1]]
    for position, part in enumerate(parts):
        if glob.has_magic(part):
            fixed = [*parts[:position]]
            break
    return os.path.join(*fixed) if fixed else os.curdir


def _too_few(config: DataConfig, split: str, what: str, counts: dict[str, int]) -> str:
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    ways = [f"give more {what}"]
    if split == config.train_split:
        ways.append("train on all of them with --data.train-split all")
    if split == config.eval_split:
        ways.append("measure on what is trained on with --data.eval-split all")
        ways.append("train without a held-out loss with --eval.every 0")
    return (
        f"data.source {config.source!r} has too few {what} for a non-empty {split!r} split ({found}); "
        f"{', or '.join(ways)}"
    )


def _require_shards(split: str, shards: Sequence[Path]) -> None:
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        raise ValueError(
            f"split {split!r} of the prepared data set in {missing[0].parent} has {len(shards) - len(missing)} of its "
            f"{len(shards)} files, the first that is missing is {missing[0].name}; copy it there, or prepare the set "
            "again with tfds build"
        )


def _require_name(what: str, name: str, names: Sequence[str], where: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} {name!r} {where}; there are {', '.join(names)}{hint}")
