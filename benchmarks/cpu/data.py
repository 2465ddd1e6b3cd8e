"""Measure data sources: `python -m benchmarks.cpu.data`.

Writes a corpus of short documents (20 to 200 bytes) for each source, and large files of --long-bytes, into --folder
where they are not there yet: `long` is one document, `long_jsonl` has texts of about 2,500 bytes. Then each source is
read by a process of its own, which prints: seconds from the call of train_batches to the first batch, tokens/s of the
batches after it (over several windows), and the peak of the resident memory, imports and all. Seconds of the CPU stand
beside those of the clock, for a machine that does other work too. Sources with an index (jsonl, parquet, hf) are opened
by another process before, whose seconds to the first batch are the column `index s`: it builds the index.

Goals at 300,000 documents: 5 s, 500,000 tokens/s; for a file of 1 GB: 5 s, 1.5 GB.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tokenizers
from array_record.python import array_record_module

from benchmarks import timing
from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, register_source, train_batches
from transmamba_jax.data.train_tokenizer import train
from transmamba_jax.runtime import host_memory

ROWS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hf", "long_jsonl", "prompts", "mixture")
SOURCES = ("text", "array_record", "tfds", "registered", "long", *ROWS)
TOKENIZERS = ("bytes", "bpe")
WORDS = ("the of and to in is was for that on as with by he at from his it an were which are this be or " * 2).split()
SEQ_LEN, BATCH_SIZE = 512, 8


def documents(count: int) -> Iterator[str]:
    """Yield short texts, the same every time."""
    generator = random.Random(0)
    for number in range(count):
        yield f"{number} " + " ".join(generator.choices(WORDS, k=generator.randint(5, 50)))


def write(folder: Path, source: str, count: int, long_bytes: int) -> str:
    """Write the corpus of a source where it is not there, and return its name for `data.source`."""
    if source == "mixture":
        return ",".join(write(folder, each, count, long_bytes) for each in ("jsonl", "parquet"))
    place = folder / f"{source}-{long_bytes if source.startswith('long') else count}"
    if source == "registered":
        return f"registered:{count}"
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        if source == "text":
            for number, text in enumerate(documents(count)):
                part = place / f"{number // 1000:04d}"
                part.mkdir(exist_ok=True)
                (part / f"{number}.txt").write_text(text)
        elif source == "array_record":
            writer = array_record_module.ArrayRecordWriter(str(place / "0.array_record"), "group_size:1")
            for text in documents(count):
                writer.write(text.encode())
            writer.close()
        elif source == "tfds":
            _prepare_tfds(place, count)
        elif source in ROWS:
            _write_rows(place, source, count, long_bytes)
        else:
            block = "\n".join(documents(10_000)).encode() + b"\n"
            with open(place / "long.txt", "wb") as file:
                while file.tell() < long_bytes:
                    file.write(block[: long_bytes - file.tell()])
        (place / "done").touch()
    names = {"text": f"text:{place}/**/*.txt", "long": f"text:{place}/*.txt", "tfds": "tfds:short_documents"}
    names |= {"parquet": f"parquet:{place}/*.parquet", "hf": f"hf:{place}", "jsonl": f"jsonl:{place}/*.jsonl*"}
    names |= {each: names["jsonl"] for each in ("jsonl.gz", "jsonl.zst", "long_jsonl", "prompts")}
    return names.get(source, f"array_record:{place}/*.array_record")


def _write_rows(place: Path, source: str, count: int, long_bytes: int) -> None:
    """Write rows with a number, a text, and a prompt with its completion."""
    texts: Iterator[str] = documents(count)
    if source == "long_jsonl":
        block = " ".join(itertools.islice(documents(10_000), 20))
        texts = (f"{number} {block}" for number in range(long_bytes // (2 * len(block) + 100)))
    rows = ({"id": n, "text": text, "q": text[:20], "a": text[20:]} for n, text in enumerate(texts))
    if source == "hf":
        (place / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    if source in ("hf", "parquet"):
        schema = pyarrow.schema([("id", pyarrow.int64()), *((name, pyarrow.string()) for name in ("text", "q", "a"))])
        with contextlib.ExitStack() as stack:
            if source == "hf":
                writer = stack.enter_context(pyarrow.ipc.new_stream(str(place / "data.arrow"), schema))
            else:
                writer = stack.enter_context(pyarrow.parquet.ParquetWriter(place / "data.parquet", schema))
            while batch := list(itertools.islice(rows, 1000 if source == "hf" else 100_000)):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
        return
    ending = source.removeprefix("jsonl") if source.startswith("jsonl") else ""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(place / f"data.jsonl{ending}", "wb"))
        if ending == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1))
        elif ending == ".zst":
            file = stack.enter_context(pyarrow.CompressedOutputStream(file, "zstd"))
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


def _prepare_tfds(place: Path, count: int) -> None:
    import tensorflow_datasets as tfds

    class ShortDocuments(tfds.core.GeneratorBasedBuilder):
        """Short documents."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                disable_shuffling=True,
            )

        def _split_generators(self, _: tfds.download.DownloadManager) -> dict[str, Iterator]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            return ((number, {"text": text}) for number, text in enumerate(documents(count)))

    builder = ShortDocuments(data_dir=place, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


class _Numbered:
    """A sequence whose documents are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count, self._texts = count, list(documents(1000))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        return self._texts[index % 1000]


def measure(source: str, tokenizer_file: str, cache: str, batches: int) -> dict[str, float]:
    """Read a source in this process."""
    register_source("registered", lambda _config, rest, _split: _Numbered(int(rest)))
    names = source.split(",")
    prompts = {"prompt_field": "q", "completion_field": "a"} if "/prompts-" in source else {}
    where = {"source": source} if len(names) == 1 else {"mixture": dict.fromkeys(names, 1.0)}
    config = DataConfig(
        **where,
        **prompts,
        cache_dir=cache,
        tokenizer=tokenizer_file,
        train_split="train" if source.startswith("tfds") else "all",
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
    )
    tokenizer = load_tokenizer(tokenizer_file)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    iterator = train_batches(config, tokenizer)
    next(iterator)
    first, first_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(iterator)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    iterator.close()
    tokens = batches * BATCH_SIZE * (SEQ_LEN + 1)
    return {
        "first batch s": first,
        "CPU s": first_cpu,
        "tokens/s": tokens / seconds,
        "tokens/CPU s": tokens / cpu,
        "peak MB": host_memory.peak_bytes() / 1e6,
    }


def _run(batches: int, *arguments: str) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.data", "--batches", str(batches), "--measure", *arguments]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def library_tokens_per_cpu_second(tokenizer_file: Path) -> float:
    """Encode short documents without reading or packing them: the most that a source can reach on one core."""
    library, texts = tokenizers.Tokenizer.from_file(str(tokenizer_file)), list(documents(60_000))
    begin, tokens = time.process_time(), 0
    for start in range(0, len(texts), 128):
        tokens += sum(map(len, library.encode_batch_fast(texts[start : start + 128], add_special_tokens=False)))
    return tokens / (time.process_time() - begin)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/transmamba-data"), help="where corpora are written")
    parser.add_argument("--documents", type=int, default=300_000, metavar="N", help="short documents of each source")
    parser.add_argument("--long-bytes", type=int, default=10**9, metavar="N", help="bytes of the long text file")
    parser.add_argument("--batches", type=int, default=1000, metavar="N", help="batches that tokens/s is measured over")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS), choices=TOKENIZERS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # of the child: source, tokenizer, cache
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.batches)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    bpe = options.folder / "bpe.json"
    bpe.write_text(train((text.encode() for text in documents(2000)), 1000))
    print(timing.heading("grain", "array_record", "tokenizers"))
    print(f"{options.documents:,} documents, long file {options.long_bytes:,} bytes, load {os.getloadavg()[0]:.1f}")
    print(f"the tokenizers library alone, BPE: {library_tokens_per_cpu_second(bpe):,.0f} tokens/CPU s")
    columns = f"{'index s':>9}{'first batch s':>14}{'CPU s':>8}{'tokens/s':>12}{'tokens/CPU s':>14}{'peak MB':>9}"
    print(f"{'source':14}{'tokenizer':11}{columns}")
    for source in options.sources:
        name = write(options.folder, source, options.documents, options.long_bytes)
        for tokenizer in options.tokenizers:
            file = "bytes" if tokenizer == "bytes" else str(bpe)
            cache = str(options.folder / f"tfds-{options.documents}")
            index = ""
            if source in ROWS:
                shutil.rmtree(Path(cache) / "rows", ignore_errors=True)
                index = f"{_run(1, name, file, cache)['first batch s']:.2f}"
            found = _run(options.batches, name, file, cache)
            print(
                f"{source:14}{tokenizer:11}{index:>9}{found['first batch s']:14.2f}{found['CPU s']:8.2f}"
                f"{found['tokens/s']:12,.0f}{found['tokens/CPU s']:14,.0f}{found['peak MB']:9,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
