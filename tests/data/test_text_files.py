"""Test that a text source refuses records and archives with what to type instead."""

import gzip
from pathlib import Path

import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data.sources import open_documents


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.jsonl", r"write 'jsonl:.*/\*'"),
        ("a.JSONL.gz", r"write 'jsonl:.*/\*'"),
        ("a.ndjson.zst", r"write 'jsonl:.*/\*'"),
        ("a.json", "write each document of it into a .txt file"),
        ("a.parquet", r"write 'parquet:.*/\*'"),
        ("a.arrow", "write 'hf:<folder>' for a data set that save_to_disk"),
        ("a.txt.gz", r"unpack it first \(gunzip .*/a\.txt\.gz\) and name what comes out"),
        ("a.zst", r"unpack it first \(zstd -d .*/a\.zst\)"),
        ("a.tar", r"unpack it first \(tar -xf .*/a\.tar\)"),
        ("a.array_record", r"write 'array_record:.*/\*'"),
        ("a-train.array_record-00000-of-00002", r"write 'array_record:.*/\*'"),
        ("a-train.tfrecord-00000-of-00002", "write 'tfds:<name>' for a data set"),
    ],
)
def test_other_formats_are_refused_with_what_to_type(tmp_path: Path, name: str, way: str):
    for each in (name, "b" + name):
        (tmp_path / each).write_text("{}")
    with pytest.raises(
        ValueError, match=rf"reads each file as plain text, which .*/{name} \(and 1 more\) is not; {way}"
    ):
        open_documents(DataConfig(source=f"text:{tmp_path}/*"), "all")


def test_text_beside_other_formats_is_named(tmp_path: Path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=rf"or name the text files alone with 'text:{tmp_path}/\*\.txt'$"):
        open_documents(DataConfig(source=f"text:{tmp_path}/*"), "all")
    assert len(open_documents(DataConfig(source=f"text:{tmp_path}/*.txt"), "all")) == 2


@pytest.mark.parametrize("name", ["notes.jsonl.txt", "json", "README", "a.py", "gz.md", "data.csv"])
def test_plain_text_of_any_name_is_read(tmp_path: Path, name: str):
    (tmp_path / name).write_text("text")
    assert open_documents(DataConfig(source=f"text:{tmp_path}/*"), "all")[0] == b"text"


def test_a_byte_order_mark_is_none_of_the_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffé".encode())
    documents = open_documents(DataConfig(source=f"text:{tmp_path}/*"), "all")
    assert documents[0] == "é".encode()
    assert documents.read_range(0, 0, 5) == "é".encode()
    assert documents.read_range(0, 3, 5) == "é".encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"text", mtime=0), "offset 1 .*it looks like gzip: unpack it with gunzip"),
        ("text".encode("utf-16"), "offset 0 .*it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
        ("naïve".encode("latin-1"), r"offset 2 \(byte 0xef\)$"),
    ],
)
def test_bytes_that_are_not_text_are_named_by_their_format(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "a.txt").write_bytes(data)
    documents = open_documents(DataConfig(source=f"text:{tmp_path}/*"), "all")
    with pytest.raises(ValueError, match=message):
        documents[0]
