"""Sources and their splits: what is read, and what is said when it cannot be."""

import itertools
import pickle
from collections import Counter
from pathlib import Path

import pytest
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from transmamba_jax.config import DataConfig
from transmamba_jax.data import records
from transmamba_jax.data.documents import take
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.splits import SPLITS, records_of_split, split_of, split_of_record


def read(config: DataConfig, split: str) -> list[bytes]:
    documents = open_documents(config, split)
    return [documents[index] for index in range(len(documents))]


def text_source(folder: Path) -> DataConfig:
    return DataConfig(source=f"text:{folder}/*.txt")


def write_records(path: Path, records: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_splits_of_text_files_are_a_partition(tmp_path, write_corpus):
    texts = write_corpus(200)
    parts = [read(text_source(tmp_path), split) for split in SPLITS]
    assert all(parts)
    assert Counter(itertools.chain(*parts)) == Counter(texts)
    assert read(text_source(tmp_path), "all") == texts


def test_split_follows_the_name_below_the_wildcard(tmp_path, write_corpus):
    texts = write_corpus(200)
    elsewhere = tmp_path / "moved" / "here"
    elsewhere.mkdir(parents=True)
    for path in tmp_path.glob("*.txt"):
        path.rename(elsewhere / path.name)
    expected = [text for number, text in enumerate(texts) if split_of(f"{number:04d}.txt") == "test"]
    assert read(text_source(elsewhere), "test") == expected
    nested = DataConfig(source=f"text:{tmp_path}/**/*.txt")
    assert read(nested, "test") == [
        text for number, text in enumerate(texts) if split_of(f"moved/here/{number:04d}.txt") == "test"
    ]


def test_split_shares():
    counts = Counter(split_of(f"folder/file{number}.py") for number in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.90) < 0.01
    assert abs(counts["validation"] / 20_000 - 0.05) < 0.01
    assert split_of("os.py") == "validation"  # the rule may never change: prepared sets depend on it


@given(st.integers(0, 200))
def test_records_of_splits_are_a_partition(count):
    for split in SPLITS:
        numbers = records_of_split(count, split)
        assert [numbers[i] for i in range(len(numbers))] == [i for i in range(count) if split_of_record(i) == split]
    assert [*map(records_of_split(count, "all").__getitem__, range(count))] == list(range(count))


def test_array_records(tmp_path):
    texts = [f"record {number}".encode() for number in range(45)]
    write_records(tmp_path / "a.array_record", texts[:7])
    write_records(tmp_path / "b.array_record", texts[7:])
    config = DataConfig(source=f"array_record:{tmp_path}/*.array_record")
    assert read(config, "all") == texts
    assert read(config, "validation") == [texts[9], texts[29]]
    assert read(config, "test") == [texts[19], texts[39]]
    assert len(read(config, "train")) == 41
    assert open_documents(config, "validation").where(0) == f"record 2 of {tmp_path}/b.array_record"


def test_documents_pickle_after_use(tmp_path, stdlib_cache):
    write_records(tmp_path / "a.array_record", [b"one", b"two"])
    for config in (DataConfig(source=f"array_record:{tmp_path}/*"), DataConfig(cache_dir=str(stdlib_cache))):
        documents = open_documents(config, "train")
        first = documents[0]
        copy = pickle.loads(pickle.dumps(documents))
        assert copy[0] == first
        assert len(copy) == len(documents)


def test_undecodable_file_is_named_with_its_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    documents = open_documents(text_source(tmp_path), "all")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: .* at byte offset 5 \(byte 0xff\)"):
        documents[0]


def test_undecodable_record_is_named_with_its_offset(tmp_path):
    write_records(tmp_path / "a.array_record", [b"fine", b"\xc3("])
    documents = open_documents(DataConfig(source=f"array_record:{tmp_path}/*"), "all")
    with pytest.raises(ValueError, match=r"record 1 of .*a\.array_record is not UTF-8: .* offset 0"):
        documents[1]


def test_a_file_that_cannot_be_read_is_named(tmp_path, write_corpus):
    write_corpus(2)
    documents = open_documents(text_source(tmp_path), "all")
    (tmp_path / "0001.txt").unlink()
    with pytest.raises(ValueError, match=r"0001\.txt cannot be read: .*No such file"):
        documents[1]


@pytest.mark.parametrize("content", ["text", "half a file", "nothing"])
def test_files_without_readable_records_are_named(tmp_path, content):
    write_records(tmp_path / "a.array_record", [b"one", b"two"])
    whole = (tmp_path / "a.array_record").read_bytes()
    data = {"text": b"text\n" * 50_000, "half a file": whole[: len(whole) // 2], "nothing": b""}[content]
    (tmp_path / "b.array_record").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"read a single record of .*b\.array_record: it is no array_record file, or cut"
    ):
        open_documents(DataConfig(source=f"array_record:{tmp_path}/*"), "all")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"'stdlib' cannot be prepared in data\.cache_dir .*file/cache': .*Not a dir"):
        open_documents(DataConfig(cache_dir=str(tmp_path / "file" / "cache")), "train")


def test_no_file_matches(tmp_path):
    with pytest.raises(ValueError, match=r"text:.*\*\.txt' matches no file"):
        open_documents(text_source(tmp_path), "train")


@pytest.mark.parametrize("source", ["stdlib", "text:*.txt", "array_record:*"])
def test_wrong_split_names_the_nearest(source):
    with pytest.raises(ValueError, match=r"no split 'vaildation' .* there are train, validation, test.*'validation'"):
        open_documents(DataConfig(source=source), "vaildation")


def test_too_few_files_for_a_split(tmp_path, write_corpus):
    write_corpus(1)
    ways = "give more files, or .* --data.eval-split all, or .* --eval.every 0$"
    with pytest.raises(ValueError, match=rf"too few files .*'validation'.* \(train 1, validation 0, test 0\); {ways}"):
        open_documents(text_source(tmp_path), "validation")
    (tmp_path / "0000.txt").rename(tmp_path / "0036.txt")
    with pytest.raises(ValueError, match=r"\(train 0, validation 1, test 0\); .* --data.train-split all$"):
        open_documents(text_source(tmp_path), "train")


def test_too_few_records_for_a_split(tmp_path):
    write_records(tmp_path / "a.array_record", [b"one", b"two"])
    with pytest.raises(ValueError, match=r"too few records .* \(train 2, validation 0, test 0\)"):
        open_documents(DataConfig(source=f"array_record:{tmp_path}/*"), "test")


def test_take_stops_behind_the_document_that_reaches_the_limit(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_bytes(b"abcd")
    documents = open_documents(text_source(tmp_path), "all")
    assert len(list(take(documents, 9))) == 3
    assert len(list(take(documents, 100, stride=2))) == 3


def test_no_more_than_some_record_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "OPEN_FILES", 2)
    for number in range(5):
        write_records(tmp_path / f"{number}.array_record", [b"%d" % number] * 2)
    documents = open_documents(DataConfig(source=f"array_record:{tmp_path}/*"), "all")
    for index in [*range(10), 0, 9]:
        assert documents[index] == b"%d" % (index // 2)
        assert len(documents.reader()) <= 2
    (tmp_path / "3.array_record").unlink()
    with pytest.raises(ValueError, match=r"record 0 of .*3\.array_record cannot be read: .*No such file"):
        documents[6]


def test_a_record_is_read_by_its_range(tmp_path, monkeypatch):
    """A list of one number takes time in proportion to the records of the whole file: 1,186 against 6 microseconds."""
    write_records(tmp_path / "a.array_record", [b"one", b"two", b"three"])
    calls, opened = [], records._open_reader

    class Reader:
        def __init__(self, path):
            self._reader = opened(path)
            self.num_records = self._reader.num_records

        def read(self, *arguments):
            calls.append(arguments)
            return self._reader.read(*arguments)

    monkeypatch.setattr(records, "_open_reader", Reader)
    assert read(DataConfig(source=f"array_record:{tmp_path}/*"), "all") == [b"one", b"two", b"three"]
    assert calls == [(0, 1), (1, 2), (2, 3)]
