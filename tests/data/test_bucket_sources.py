"""Sources whose files are in a bucket give the documents, splits and rows of the same files in a folder."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.data.test_row_sources import save_to_disk, write_jsonl, write_parquet
from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, train_batches
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.write_records import main as write_records


@pytest.fixture(name="folders")
def _folders(tmp_path, bucket, request):
    """Return a folder and its twin in the bucket: texts, JSON lines, Parquet, Arrow and records."""
    folder, twin = tmp_path / "files", f"gs://bucket/{request.node.name.partition('[')[0]}"
    for place in ("text/a", "text/b", "rows"):
        (folder / place).mkdir(parents=True)
    for index in range(40):
        for place in "ab":
            (folder / f"text/{place}/{index:02}.txt").write_text(f"text {index} of {place}\n" * 3, encoding="utf-8")
    rows = [{"text": f"row {index}", "other": f"other {index}"} for index in range(60)]
    for name in "plain.jsonl", "packed.jsonl.gz", "packed.jsonl.zst":
        write_jsonl(folder / "rows" / name, rows)
    for index in range(2):
        write_parquet(folder / f"rows/{index}.parquet", rows[30 * index : 30 * index + 30])
    for split in "train", "validation":
        save_to_disk(folder / "sets" / split, rows[:40], rows[40:])
    (folder / "sets/dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}), encoding="utf-8")
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
    "text:{}//text/./a//*.txt",
    "jsonl:{}/rows/*.jsonl*",
    "jsonl:{}/rows/packed.jsonl.zst",
    "parquet:{}/rows/*.parquet",
    "parquet:{}/**/0.parquet",
    "hf:{}/sets",
    "hf:{}/sets/train/",
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


def test_rows_with_fields_and_prompts_are_those_of_a_folder(folders, tmp_path):
    prompts = {"prompt_field": "text", "completion_field": "other"}
    for kind, name in ("jsonl", "rows/plain.jsonl"), ("parquet", "rows/*.parquet"), ("hf", "sets/train"):
        expected, found = (
            list(
                open_documents(DataConfig(source=f"{kind}:{folder}/{name}", cache_dir=str(tmp_path), **prompts), "all")
            )
            for folder in folders
        )
        assert len(found) == 60
        assert found == expected


def test_what_is_wrong_with_an_object_is_told_under_its_own_name(folders, bucket, tmp_path):
    name = folders[1].removeprefix("gs://bucket/")
    bucket.put(f"{name}/rows/plain.jsonl", b'{"text": "a"}\n{broken\n')
    for source, message in (
        ("jsonl:{}/rows/*.jsonl", r"line 2 of {}/rows/plain\.jsonl is not JSON"),
        ("text:{}/rows/*.jsonl", r"which {}/rows/plain\.jsonl is not; write 'jsonl:{}/rows/\*\.jsonl'"),
        ("hf:{}/sets", r"no split 'test' .*'hf:{}/sets/train' is split 'train' alone"),
    ):
        there = folders[1]
        config = DataConfig(source=source.format(there), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=message.format(there, there)):
            open_documents(config, "test")


@pytest.mark.parametrize(
    ("sources", "file"),
    [
        (("text:{}/text/a/*.txt", "text:{}/text/**/*.txt"), "text/a/00.txt"),
        (("jsonl:{}/rows/plain.jsonl", "jsonl:{}/rows/*.jsonl"), "rows/plain.jsonl"),
    ],
)
def test_an_object_that_is_in_two_sources_with_other_splits_is_refused(folders, tmp_path, sources, file):
    mixture = {source.format(folders[1]): 1.0 for source in sources}
    config = DataConfig(mixture=mixture, seq_len=15, batch_size=2, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"data.mixture: {folders[1]}/{file} is in .*where its splits differ"):
        train_batches(config, load_tokenizer("bytes"))


def test_a_bucket_and_a_folder_are_mixed(folders, tmp_path):
    mixture = {f"text:{folders[0]}/text/**/*.txt": 1.0, f"jsonl:{folders[1]}/rows/plain.jsonl": 1.0}
    config = DataConfig(mixture=mixture, seq_len=15, batch_size=2, cache_dir=str(tmp_path / "cache"))
    texts = [
        bytes(np.asarray(row, np.uint8)) for row in next(iter(train_batches(config, load_tokenizer("bytes"))))["tokens"]
    ]
    assert sum(b"text" in text for text in texts) == 1
    assert sum(b"row" in text for text in texts) == 1


def test_a_cache_that_is_in_a_bucket_or_is_a_file_is_refused(folders, tmp_path):
    for place in folders:
        config = DataConfig(source=f"jsonl:{place}/rows/*.jsonl", cache_dir="gs://bucket/cache")
        with pytest.raises(
            ValueError, match=r"data\.cache_dir must be a folder of this machine, found gs://bucket/cache"
        ):
            open_documents(config, "train")
    (tmp_path / "file").touch()
    config = DataConfig(source=f"text:{folders[1]}/text/a/*.txt", cache_dir=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=f"cannot copy {folders[1]}/text/a into {tmp_path}/file: Not a directory"):
        open_documents(config, "train")


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
        ("text:gs://bucket/{}/text/{{a,b}}/*", r"matches no object; braces are no wildcards; gs://bucket/\S* holds"),
        ("hf:gs://bucket/{}/set*", r"set\* has a wildcard \(\* \? \[\), and must name one place"),
        ("text:gs://bucket/{}/../a/*.txt", r"has '\.\.', which a bucket does not have"),
        ("text:gs://bucket/{}/text/a", r"names folders; for the objects in them write gs://bucket/\S*/text/a/\*\*/\*"),
        ("jsonl:gs://no-such-bucket/*.jsonl", "there is no bucket no-such-bucket"),
        (
            "hf:gs://bucket/{}/none",
            r"there is no folder gs://bucket/\S*/none; gs://bucket/\S* holds records, rows, sets, text",
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
