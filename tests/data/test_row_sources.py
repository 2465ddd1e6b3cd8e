"""Test rows of jsonl, Parquet and Hugging Face files: documents, splits, indexes, and rows that are broken."""

import dataclasses
import gzip
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data import encoding, load_tokenizer, row_index
from transmamba_jax.data.documents import CompletionDocument, Documents
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.splits import split_of_record

Rows = list[dict[str, Any]]
TEXTS = [f"row {number} é \u2028 \n end" for number in range(45)]


def write_jsonl(path: Path, rows: Rows) -> None:
    """Write lines, with an empty one before each; the name says how they are compressed."""
    data = "".join(f"\n{json.dumps(row, ensure_ascii=number % 2 == 0)}\n" for number, row in enumerate(rows)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data[:100]) + gzip.compress(data[100:])  # two members, as appending makes
    elif path.suffix == ".zst":
        data = pyarrow.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)


def write_parquet(path: Path, rows: Rows) -> None:
    """Write rows in groups of 4."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)


def write_arrow(path: Path, rows: Rows) -> None:
    """Write record batches of 4 rows, as Hugging Face datasets does."""
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=4)


def save_to_disk(folder: Path, *files: Rows) -> None:
    """Write a folder as `save_to_disk` of Hugging Face datasets does."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for name, rows in zip(names, files, strict=True):
        write_arrow(folder / name, rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def make(kind: str, folder: Path, *files: Rows, **options: Any) -> DataConfig:
    """Write files of one kind into a folder and return the config that reads them."""
    source = f"{kind.partition('.')[0]}:{folder}/*.{kind}"
    if kind == "hf":
        save_to_disk(folder, *files)
        source = f"hf:{folder}"
    for number, rows in enumerate(files):
        if kind == "parquet":
            write_parquet(folder / f"{number}.parquet", rows)
        elif kind != "hf":
            write_jsonl(folder / f"{number}.{kind}", rows)
    return DataConfig(source=source, cache_dir=str(folder / "cache"), **options)


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hf"]
NAMES = {"parquet": ("row", 0, "parquet"), "hf": ("row", 0, "arrow")}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of file."""
    return request.param


def read(config: DataConfig, split: str) -> list[bytes]:
    documents = open_documents(config, split)
    return [documents[index] for index in range(len(documents))]


def rows_of(texts: list[str]) -> Rows:
    return [{"id": number, "text": text} for number, text in enumerate(texts)]


def where(kind: str, number: int, file: str) -> str:
    """Return the name of row `number`, counted from 0, in a message."""
    name, first, _ = NAMES.get(kind, ("line", 2, ""))
    return f"{name} {number + first if kind in NAMES else 2 * number + first} of .*{file}"


def test_every_row_is_a_document_of_one_split(tmp_path: Path, kind: str) -> None:
    rows = rows_of(TEXTS)
    config = make(kind, tmp_path, rows[:7], [rows[7]], rows[8:])
    expected = [text.encode() for text in TEXTS]
    assert read(config, "all") == expected
    for split in ("train", "validation", "test"):
        assert read(config, split) == [text for number, text in enumerate(expected) if split_of_record(number) == split]
    documents = open_documents(config, "all")
    expected_name = where(kind, 2, NAMES[kind][2] if kind in NAMES else kind)
    assert re.fullmatch(expected_name, documents.where(10))


def test_documents_pickle_after_use(tmp_path: Path, kind: str) -> None:
    documents = open_documents(make(kind, tmp_path, rows_of(TEXTS)), "all")
    first = documents[0]
    data = pickle.dumps(documents)
    assert len(data) < 3000  # places and files stay on the disk
    copy = pickle.loads(data)
    assert copy[0] == first == TEXTS[0].encode()
    assert len(copy) == len(TEXTS)


def test_an_index_is_built_once_and_again_when_a_file_changes(tmp_path: Path, kind: str, monkeypatch) -> None:
    config = make(kind, tmp_path, rows_of(TEXTS))
    assert len(read(config, "all")) == len(TEXTS)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(row_index, "_build", refuse)
        assert len(read(config, "all")) == len(TEXTS)
        with pytest.raises(AssertionError, match="built again"):
            open_documents(dataclasses.replace(config, on_error="skip"), "all")
    make(kind, tmp_path, rows_of(TEXTS[::-1]))
    assert read(config, "all") == [text.encode() for text in TEXTS[::-1]]


def test_a_wrong_field_is_answered_with_those_that_exist(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, rows_of(TEXTS), text_field="txet")
    message = r"has no field 'txet' \(data.text_field\), its fields are id, text; did you mean 'text'\?"
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=message):
            open_documents(dataclasses.replace(config, on_error=on_error), "all")
    assert read(dataclasses.replace(config, text_field="text"), "all")[0] == TEXTS[0].encode()


def test_a_row_without_text_is_an_error_or_skipped_and_counted(tmp_path: Path, kind: str, caplog) -> None:
    rows = rows_of(TEXTS)
    rows[5]["text"] = rows[40]["text"] = None  # type: ignore[assignment]
    config = make(kind, tmp_path, rows[:3], rows[3:])
    broken = rf"{where(kind, 2, '')}must have text in the field 'text', found NoneType None"
    with pytest.raises(ValueError, match=rf"{broken} \(--data.on-error skip leaves such rows out"):
        open_documents(config, "all")
    with caplog.at_level(logging.WARNING):
        documents = open_documents(dataclasses.replace(config, on_error="skip"), "all")
    assert documents.skipped_rows == 2
    assert len(documents) == 43
    assert documents[5] == TEXTS[6].encode()
    assert "2 of 45 rows are skipped" in caplog.text
    name = documents.where(5)
    assert re.match(where(kind, 3, ""), name), name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "is not JSON: Expecting property name.*; each line must be an object of its own"),
        (b'{"text": "cut', "is not JSON: Invalid control character"),
        (b'{"text": "\xff"}', "is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"text": "\\ud800"}', "has no Unicode text in the field 'text': surrogates not allowed at 0"),
        (b'["text"]', "must be an object with fields, found list"),
        (b'{"text": 3}', "must have text in the field 'text', found int 3"),
        (b"[" * 100_000, "is not JSON: "),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\r\n' + line + b'\n{"text": "last"}')
    config = DataConfig(source=f"jsonl:{tmp_path}/*.jsonl", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=rf"line 2 of .*/a\.jsonl {message}"):
        open_documents(config, "all")
    assert read(dataclasses.replace(config, on_error="skip"), "all") == [b"first", b"last"]


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", None)])
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path, ending: str, compress: Any) -> None:
    lines = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(5000))
    data = compress(lines) if compress else pyarrow.compress(lines, "zstd", asbytes=True)
    (tmp_path / f"a.jsonl.{ending}").write_bytes(data[: len(data) // 2])
    config = DataConfig(source=f"jsonl:{tmp_path}/*", cache_dir=str(tmp_path / "cache"), on_error="skip")
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{ending} is damaged behind line \d+"):
        open_documents(config, "all")
    assert not list((tmp_path / "cache").glob("rows/*.partial"))


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.parquet"}]}')
    for source, message in (
        (f"parquet:{tmp_path}/*", r"a\.parquet cannot be read as Parquet"),
        (f"hf:{tmp_path}", r"a\.parquet is no stream of Arrow record batches"),
        ("hf:nowhere", "must be a folder that save_to_disk .* wrote; there is no such folder"),
        ("jsonl:nowhere/*", "matches no file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_documents(DataConfig(source=source, cache_dir=str(tmp_path / "cache")), "all")
    (tmp_path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"it has no state.json; for its Parquet files write 'parquet:.*/\*\*/\*.parq"):
        open_documents(DataConfig(source=f"hf:{tmp_path}"), "all")


def test_text_that_is_not_utf8_is_a_broken_row(tmp_path: Path) -> None:
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    config = DataConfig(source=f"parquet:{tmp_path}/*", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"row 1 of .*/a\.parquet must have text in the field 'text', found NoneType"):
        open_documents(config, "all")
    assert read(dataclasses.replace(config, on_error="skip"), "all") == [b"a"]


def test_a_folder_of_several_splits_has_its_own(tmp_path: Path) -> None:
    for split, texts in (("train", TEXTS[:30]), ("test", TEXTS[30:])):
        save_to_disk(tmp_path / split, rows_of(texts))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    config = DataConfig(source=f"hf:{tmp_path}", cache_dir=str(tmp_path / "cache"))
    assert read(config, "train") == [text.encode() for text in TEXTS[:30]]
    assert read(config, "test") == [text.encode() for text in TEXTS[30:]]
    with pytest.raises(ValueError, match=r"no split 'validation' .*hf:.*/train' is split 'train' alone.*train, test"):
        open_documents(config, "validation")
    alone = DataConfig(source=f"hf:{tmp_path}/train", cache_dir=str(tmp_path / "cache"))
    assert read(alone, "validation") == [TEXTS[9].encode(), TEXTS[29].encode()]


SAVE = """
import sys, datasets
rows = {"id": list(range(45)), "text": [f"row {number} \\u00e9 \\u2028 \\n end" for number in range(45)]}
one = datasets.Dataset.from_dict(rows).select(range(45))
one.save_to_disk(sys.argv[1], num_shards=3)
datasets.DatasetDict({"train": one, "test": one.select([3, 1])}).save_to_disk(sys.argv[2])
"""


@pytest.mark.parametrize(("name", "key"), [("state.json", "_data_files"), ("dataset_dict.json", "splits")])
@pytest.mark.parametrize("content", ["{}", "[]", '{"_data_files": 3, "splits": "a"}'])
def test_a_description_without_its_list_is_refused(tmp_path: Path, name: str, key: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} must have a list '{key}'; save the data set again"):
        open_documents(DataConfig(source=f"hf:{tmp_path}", cache_dir=str(tmp_path / "cache")), "train")


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    config = DataConfig(source=f"parquet:{tmp_path}/*.parquet", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"has several fields 'text' \(data.text_field\); rename all but one"):
        open_documents(config, "train")


def test_the_library_s_own_folders_are_read(tmp_path: Path) -> None:
    folders = str(tmp_path / "one"), str(tmp_path / "two")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", SAVE, *folders], check=True, env=environment, capture_output=True)
    one, two = (DataConfig(source=f"hf:{folder}", cache_dir=str(tmp_path / "cache")) for folder in folders)
    assert read(one, "all") == read(two, "train") == [text.encode() for text in TEXTS]
    assert read(two, "test") == [TEXTS[3].encode(), TEXTS[1].encode()]


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[Documents], bytes]:
    """Let a document of more than 100 bytes be long; return the text of document 1, encoded in parts."""
    for module in (encoding, row_index):
        monkeypatch.setattr(module, "PART_BYTES", 100)

    def join(documents: Documents) -> bytes:
        parts = encoding.EncodeInParts(documents, load_tokenizer("bytes")).flat_map(1)
        assert len(parts) > 5
        tokens = [parts[number]["tokens"].view(encoding.TOKEN)["id"] for number in range(len(parts))]
        return b"".join(bytes(each.tolist()) for each in tokens)

    return join


def test_a_long_text_is_encoded_in_parts(tmp_path: Path, kind: str, long_rows) -> None:
    config = make(kind, tmp_path, rows_of(["short", "é" * 400, "short"]))
    documents = open_documents(config, "all")
    assert documents.has_long
    assert long_rows(documents) == ("é" * 400).encode() + b"\0"


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    config = make("jsonl", tmp_path, rows_of(TEXTS))
    documents = open_documents(config, "all")
    assert documents[0] == TEXTS[0].encode()
    data = (tmp_path / "0.jsonl").read_bytes()
    (tmp_path / "0.jsonl").write_bytes(b"x" * (len(data) // 2))
    with pytest.raises(ValueError, match=r"of .*0\.jsonl cannot be read: the file became shorter"):
        documents[44]
    with pytest.raises(ValueError, match=r"0\.jsonl cannot be read: it is not JSON.*changed since it was indexed"):
        documents[1]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = make("jsonl", tmp_path, rows_of(TEXTS))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"'jsonl:' cannot be indexed in data.cache_dir '.*/file/cache': .*Not a dir"):
        open_documents(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache")), "all")


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
ROW = {"text": "t", "question": "1+1=", "answer": "2é", "messages": CHAT}


def segments(config: DataConfig) -> tuple[tuple[bytes, bool], ...]:
    document = open_documents(config, "all")[0]
    assert isinstance(document, CompletionDocument)
    assert document == b"".join(text for text, _ in document.segments)
    assert pickle.loads(pickle.dumps(document)).segments == document.segments
    return document.segments


def test_prompts_and_completions(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, [ROW] * 3, prompt_field="question", completion_field="answer")
    assert segments(config) == ((b"1+1=", False), ("2é".encode(), True))
    with pytest.raises(ValueError, match=r"has no field 'reply' \(data.completion_field\), its fields are text, quest"):
        open_documents(dataclasses.replace(config, completion_field="reply"), "all")


def test_chats(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, [ROW] * 3, messages_field="messages")
    assert segments(config) == (
        (b"<|im_start|>system\n", False),
        (b"Be brief.<|im_end|>\n", False),
        (b"<|im_start|>user\n", False),
        (b"1+1?<|im_end|>\n", False),
        (b"<|im_start|>assistant\n", False),
        (b"2<|im_end|>\n", True),
    )
    plain = segments(dataclasses.replace(config, chat_template="plain"))
    assert b"".join(text for text, _ in plain) == b"System: Be brief.\nUser: 1+1?\nAssistant: 2\n"
    assert [text for text, learned in plain if learned] == [b"2\n"]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "must have a list of messages in the field 'chat', found list"),
        ("text", "must have a list of messages in the field 'chat', found str 'text'"),
        ([{"role": "user"}], r"must have a text as role and as content of chat\[0\], found dict"),
        ([*CHAT, 3], r"content of chat\[3\], found int 3"),
        (CHAT[:2], "has no message of the role assistant in the field 'chat': nothing to train on"),
    ],
)
def test_chats_that_are_none_are_refused(tmp_path: Path, chat: Any, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"chat": chat}))
    config = DataConfig(source=f"jsonl:{tmp_path}/*.jsonl", cache_dir=str(tmp_path), messages_field="chat")
    with pytest.raises(ValueError, match=rf"line 1 of .* {message}"):
        open_documents(config, "all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_field": "a"}, "prompt_field and data.completion_field go together, found 'a' and None"),
        ({"completion_field": "a"}, "go together"),
        ({"prompt_field": "a", "completion_field": "a"}, "must differ, found 'a' twice"),
        (
            {"prompt_field": "a", "completion_field": "b", "messages_field": "c"},
            "give data.prompt_field or data.messages_field, found 'a' and 'c'",
        ),
        ({"messages_field": "c", "source": "text:*"}, r"rows with fields \(jsonl, .*\), found text:\*$"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "jsonl:*", **options})
