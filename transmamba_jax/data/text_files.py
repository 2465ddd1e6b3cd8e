"""The source `text:<glob>`: a file is a document."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from transmamba_jax.config import DataConfig
from transmamba_jax.data.documents import BYTE_ORDER_MARK, PART_BYTES, Documents
from transmamba_jax.data.file_patterns import find_files
from transmamba_jax.data.registry import is_registered
from transmamba_jax.data.splits import SPLITS, require_name, split_of, too_few
from transmamba_jax.runtime.paths import show_path

_NOT_TEXT = re.compile(
    r"\.(?P<form>jsonl|ndjson|json|parquet|arrow|feather|array_?record|tfrecords?)(-\d+-of-\d+)?(\.(gz|zst|bz2|xz|lz4|snappy))?$"
    r"|\.(?P<archive>gz|tgz|zst|bz2|xz|lz4|zip|tar|7z|rar)$",
    re.IGNORECASE,
)
_UNPACK = {"gz": "gunzip", "zst": "zstd -d", "bz2": "bunzip2", "xz": "unxz", "lz4": "unlz4", "zip": "unzip"}
_SOURCE_OF = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
    "array_record": "array_record",
    "arrayrecord": "array_record",
    "tfrecord": "tfds",
    "tfrecords": "tfds",
}


class TextFiles(Documents):
    """Files, each of them one document."""

    def __init__(self, paths: Sequence[str]):
        """Take the files in the given order."""
        self._paths = list(paths)
        self._sizes = [os.path.getsize(path) for path in paths]

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        """Name the file."""
        return show_path(self._paths[index])

    def _read(self, index: int) -> bytes:
        try:
            return Path(self._paths[index]).read_bytes().removeprefix(BYTE_ORDER_MARK)
        except OSError as error:
            raise OSError(error.strerror) from error  # without the name, whose bytes may not be printable

    @functools.cached_property
    def has_long(self) -> bool:
        """Tell whether a file has more than PART_BYTES."""
        return max(self._sizes) > PART_BYTES

    def size(self, index: int) -> int:
        """Return the bytes that the file had when the source was opened."""
        return self._sizes[index]

    def read_range(self, index: int, start: int, stop: int) -> bytes:
        """Return a part of the file.

        Raises:
            ValueError: it cannot be read, or became shorter.
        """
        try:
            with open(self._paths[index], "rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise ValueError(f"{self.where(index)} cannot be read: {error.strerror}") from error
        if len(data) < min(stop, self._sizes[index]) - start:
            raise ValueError(f"{self.where(index)} became shorter than its {self._sizes[index]:,} bytes at the start")
        return data if start else data.removeprefix(BYTE_ORDER_MARK)


def open_text(config: DataConfig, pattern: str, split: str) -> Documents:
    """Return the files of one split; the name below the first wildcard decides it.

    Raises:
        ValueError: no file matches, one is not plain text by its name, or the split is unknown or has no file.
    """
    require_name("split", split, (*SPLITS, "all"), f"of data.source={show_path(config.source)!r}")
    names = find_files("text", pattern)
    _refuse_other_formats(pattern, list(names))
    chosen = [path for path in names if split in ("all", split_of(names[path]))]
    if not chosen:
        counts = {each: sum(split_of(name) == each for name in names.values()) for each in SPLITS}
        raise ValueError(too_few(config, split, "files", counts))
    return TextFiles(chosen)


def _refuse_other_formats(pattern: str, paths: Sequence[str]) -> None:
    """Refuse records and archives, which a text source would train on as they are written."""
    others = [path for path in paths if _NOT_TEXT.search(path)]
    if not others:
        return
    match = _NOT_TEXT.search(others[0])
    assert match is not None
    endings = sorted(
        {os.path.splitext(path)[1] for path in paths} - {os.path.splitext(path)[1] for path in others} - {""}
    )
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    way = _other_source(pattern, match["form"].lower()) if match["form"] else _unpack(others[0], match["archive"])
    if endings:
        alone = os.path.join(os.path.dirname(pattern), f"*{endings[0]}")
        way += f"; or name the text files alone with 'text:{show_path(alone)}'"
    raise ValueError(
        f"data.source 'text:{show_path(pattern)}' reads each file as plain text, which "
        f"{show_path(others[0])}{more} is not; {way}"
    )


def _other_source(pattern: str, form: str) -> str:
    if form == "arrow":
        return "write 'hf:<folder>' for a data set that save_to_disk of Hugging Face datasets wrote"
    source = _SOURCE_OF.get(form, "")
    if source == "tfds":
        return "write 'tfds:<name>' for a data set that TFDS prepared with --file_format=array_record"
    if is_registered(source):
        return f"write '{source}:{show_path(pattern)}'"
    return (
        "write each document of it into a .txt file, or all into array_record files, or read it through a source of "
        "your own (transmamba_jax.data.register_source)"
    )


def _unpack(path: str, ending: str) -> str:
    command = _UNPACK.get(ending.lower(), "tar -xf")
    return f"unpack it first ({command} {show_path(path)}) and name what comes out"
