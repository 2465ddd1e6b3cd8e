"""Rows with more than text, and files that are damaged or of another kind than their name says."""

import bz2
import datetime
import gzip
import json
from pathlib import Path

import pytest

from tests.data.test_row_sources import make, read, write_parquet
from transmamba_jax.config import DataConfig
from transmamba_jax.data.sources import open_documents

SENT = datetime.datetime(2024, 1, 1)
CHAT = {
    "id": 1,
    "messages": [
        {"role": "user", "content": "hi", "at": SENT},
        {"role": "assistant", "content": "yo", "at": SENT},
    ],
}


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_messages_may_have_fields_that_are_no_json(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, [CHAT] * 3, messages_field="messages", chat_template="plain")
    assert read(config, "all") == [b"User: hi\nAssistant: yo\n"] * 3
    written = json.loads(open_documents(config, "all").record(0))
    assert written == {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_parquet(tmp_path / name, [{"text": f"text {number}" * 20} for number in range(40)])
    path = tmp_path / "b.parquet"
    data = bytearray(path.read_bytes())
    data[60:160] = bytes(byte ^ 0xFF for byte in data[60:160])
    path.write_bytes(data)
    config = DataConfig(source=f"parquet:{tmp_path}/*", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as Parquet: ") as refusal:
        open_documents(config, "all")
    assert "cache_dir" not in str(refusal.value)


def test_a_damaged_arrow_file_is_no_fault_of_the_cache(tmp_path: Path) -> None:
    config = make("hf", tmp_path, [{"text": "a"}])
    next(tmp_path.glob("*.arrow")).write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(ValueError, match=r"\.arrow is no stream of Arrow record batches, or damaged: ") as refusal:
        open_documents(config, "all")
    assert "cache_dir" not in str(refusal.value)


@pytest.mark.parametrize(("pack", "way"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2")])
def test_packed_lines_under_another_name_are_recognised(tmp_path: Path, pack, way: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(pack(b'{"text": "a"}\n'))
    config = DataConfig(source=f"jsonl:{tmp_path}/*.jsonl", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=rf"line 1 of .*a\.jsonl is not JSON: .*; it looks like .* {way}"):
        open_documents(config, "all")
