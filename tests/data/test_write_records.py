"""Test the command that writes any source into array_record files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, train_batches
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.write_records import main

ROWS = [
    {
        "text": f"row {number} é",
        "q": f"Q{number}?",
        "a": "yes",
        "chat": [{"role": "user", "content": f"{number}?", "name": "x"}, {"role": "assistant", "content": "yes"}],
        "other": 1,
    }
    for number in range(45)
]
FIELDS = {
    "text": {},
    "prompts": {"prompt_field": "q", "completion_field": "a"},
    "chats": {"messages_field": "chat"},
}


def documents_of(config: DataConfig, split: str) -> list[bytes]:
    documents = open_documents(config, split)
    return [documents[index] for index in range(len(documents))]


@pytest.mark.parametrize("fields", FIELDS)
def test_records_are_the_documents_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture, fields: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    options = FIELDS[fields]
    config = DataConfig(
        source=f"jsonl:{tmp_path}/*.jsonl", cache_dir=str(tmp_path / "cache"), seq_len=31, batch_size=4, **options
    )
    records = DataConfig(source=f"array_record:{tmp_path}/records/*", seq_len=31, batch_size=4, **options)
    words = [word for name, value in options.items() for word in (f"--data.{name.replace('_', '-')}", value)]
    output = ["--output", str(tmp_path / "records"), "--shards", "3"]
    source = ["--data.source", config.source, "--data.cache-dir", str(tmp_path / "cache")]
    assert main(["--config", "tiny", *output, *source, *words]) == 0
    assert "45 documents, " in capsys.readouterr().out
    for split in ("train", "validation", "test", "all"):
        assert documents_of(records, split) == documents_of(config, split)
    batch, expected = (next(train_batches(each, load_tokenizer("bytes"))) for each in (records, config))
    assert batch.keys() == expected.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], expected[name])
    with pytest.raises(SystemExit, match="records exists; name a new folder"):
        main(["--config", "tiny", *output, *source, *words])


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    words = ["--config", "tiny", "--data.source", f"text:{tmp_path}/*.txt"]
    with pytest.raises(SystemExit, match=r"write-records: .*a\.txt is not UTF-8"):
        main([*words, "--output", str(tmp_path / "records")])
    assert not list(tmp_path.glob("records*"))
    with pytest.raises(SystemExit, match=r"--shards must be >= 1, found 0"):
        main([*words, "--output", str(tmp_path / "records"), "--shards", "0"])
    with pytest.raises(SystemExit, match=r"no split 'nowhere'"):
        main([*words, "--output", str(tmp_path / "records"), "--split", "nowhere"])


def test_an_output_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    output = tmp_path / os.fsdecode(b"rec\xe9")
    arguments = ["--config", "tiny", "--data.source", f"jsonl:{tmp_path}/*.jsonl", "--output", str(output)]
    with pytest.raises(SystemExit, match=r"--output .*/rec\\xe9 must be UTF-8"):
        main(arguments)
    assert not output.exists()
