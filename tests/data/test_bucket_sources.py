"""Sources whose files are in a bucket give the documents, splits and rows of the same files in a folder."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, train_batches
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.write_records import main as write_records


@pytest.fixture(name="folders")
def _folders(tmp_path, bucket, request):
    """Return a folder and its twin in the bucket: texts, JSON lines, records and a tokenizer."""
    folder, twin = tmp_path / "files", f"gs://bucket/{request.node.name.partition('[')[0]}"
    for place in ("text/a", "text/b", "rows"):
        (folder / place).mkdir(parents=True)
    for index in range(40):
        for place in "ab":
            (folder / f"text/{place}/{index:02}.txt").write_text(f"text {index} of {place}\n" * 3, encoding="utf-8")
    rows = "".join(json.dumps({"text": f"row {index}", "other": index}) + "\n" for index in range(60)).encode()
    (folder / "rows/plain.jsonl").write_bytes(rows)
    (folder / "rows/packed.jsonl.gz").write_bytes(gzip.compress(rows, mtime=0))
    source = f"text:{folder}/text/**/*.txt"
    arguments = ["--config", "tiny", "--data.source", source, "--data.cache-dir", str(tmp_path / "cache")]
    assert write_records([*arguments, "--output", str(folder / "records")]) == 0
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(f"{twin.removeprefix('gs://bucket/')}/{path.relative_to(folder)}", path.read_bytes())
    return folder, twin


PATTERNS = [
    "text:{}/text/**/*.txt",
    "text:{}/text/a/*.txt",
    "text:{}/text/*/0?.txt",
    "jsonl:{}/rows/*.jsonl",
    "jsonl:{}/rows/*",
    "array_record:{}/records/*",
]


def test_documents_and_splits_are_those_of_a_folder(folders, tmp_path):
    for pattern in PATTERNS:
        here, there = (
            DataConfig(source=pattern.format(folder), cache_dir=str(tmp_path / f"cache-{index}"))
            for index, folder in enumerate(folders)
        )
        for split in (here.train_split, here.eval_split):
            expected, found = (list(open_documents(config, split)) for config in (here, there))
            assert found == expected, (pattern, split)
            assert expected


def test_batches_are_those_of_a_folder_and_workers_read_the_copies(folders, tmp_path):
    config = DataConfig(source=PATTERNS[0].format(folders[0]), seq_len=31, batch_size=4, cache_dir=str(tmp_path / "c"))
    there = replace(config, source=PATTERNS[0].format(folders[1]))
    tokenizer = load_tokenizer("bytes")
    for one, other, _ in zip(train_batches(config, tokenizer), train_batches(there, tokenizer), range(4), strict=False):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_objects_are_copied_once_until_one_changes(folders, bucket, tmp_path):
    config = DataConfig(source=f"text:{folders[1]}/text/a/*.txt", cache_dir=str(tmp_path / "cache"))
    reads = lambda: sum(request.path.startswith("/download") or "alt" in request.query for request in bucket.requests)
    before = reads()
    first = list(open_documents(config, "train"))
    assert reads() == before + 40
    assert list(open_documents(config, "validation"))
    assert reads() == before + 40
    bucket.put(f"{folders[1].removeprefix('gs://bucket/')}/text/a/00.txt", b"another text")
    second = list(open_documents(config, "train"))
    assert (first[1:], second[0]) == (second[1:], b"another text")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "text:gs://bucket/nothing/*.txt",
            r"gs://bucket/nothing/\*\.txt matches no object; gs://bucket/nothing holds n",
        ),
        (
            "text:gs://bucket/{}/text/a/*.rst",
            r"matches no object; gs://bucket/\S*/text/a holds 00.txt, 01.txt, .*, \.\.\.",
        ),
        ("text:gs://bucket/{}/text/a", r"names folders; for the objects in them write gs://bucket/\S*/text/a/\*\*/\*"),
        ("jsonl:gs://no-such-bucket/*.jsonl", "there is no bucket no-such-bucket"),
        (
            "hf:gs://bucket/{}/none",
            r"there is no folder gs://bucket/\S*/none; gs://bucket/\S* holds records, rows, text",
        ),
        ("text:gs://A/*.txt", "names the bucket 'A'"),
    ],
)
def test_a_source_that_is_not_there_is_one_error(folders, tmp_path, source, message):
    name = folders[1].removeprefix("gs://bucket/")
    config = DataConfig(source=source.format(name), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"data.source '{source.partition(':')[0]}:gs://.*{message}"):
        open_documents(config, "train")


def test_a_tokenizer_is_read_from_a_bucket(bucket):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    bucket.put("tokenizer.json", tokenizer.to_str().encode())
    found = load_tokenizer("gs://bucket/tokenizer.json", "</s>")
    assert found.encode("b") == [1]
    with pytest.raises(ValueError, match=r"cannot read 'gs://bucket/none\.json': No such file"):
        load_tokenizer("gs://bucket/none.json")
