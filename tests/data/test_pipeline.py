"""The pipeline against plain numpy: what is in the rows, and that a restored position continues bit for bit."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transmamba_jax.config import DataConfig
from transmamba_jax.data import (
    eval_batches,
    held_out,
    held_out_text,
    load_tokenizer,
    pipeline,
    tokenizer_from_json,
    train_batches,
    training_text,
)
from transmamba_jax.data.train_tokenizer import train

BYTES = load_tokenizer("bytes")


@pytest.fixture
def small_windows(monkeypatch):
    """Let a window hold a few rows, so that short tests cross many of them."""
    monkeypatch.setattr(pipeline, "WINDOW_BYTES", 100)
    monkeypatch.setattr(pipeline, "BINS", 3)


def settings_for(tmp_path, **options) -> DataConfig:
    defaults = {"source": f"text:{tmp_path}/*.txt", "train_split": "all", "eval_split": "all", "seq_len": 15}
    return DataConfig(**{**defaults, "batch_size": 2, **options})


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def take_rows(batches: Iterator[dict[str, np.ndarray]], count: int, name: str = "tokens") -> np.ndarray:
    return np.concatenate([batch[name] for batch in itertools.islice(batches, count)])


def in_memory(
    texts: list[bytes], config: DataConfig, rows: int, window: int = 1, shard: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    windows = pipeline._windows(config, texts, BYTES, rows, window, shard, group=2, weighted=False)
    return iter(pipeline.FlatMapIterDataset(windows, pipeline._Cut(rows)))


documents = st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\0", b" ")), min_size=1, max_size=6)


@pytest.mark.slow
@given(documents, st.integers(1, 30), st.integers(1, 4), st.integers(1, 200))
@settings(max_examples=40)
def test_concat_is_the_stream_cut_into_rows(texts, seq_len, rows, window):
    config = DataConfig(seq_len=seq_len, shuffle=False)
    got = take_rows(in_memory(texts, config, rows, window), 5)
    stream = np.frombuffer(b"".join(text + b"\0" for text in texts), np.uint8)
    assert got.shape == (5 * rows, seq_len + 1)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got.ravel(), np.resize(stream, got.size))


@pytest.mark.slow
@given(documents, st.integers(1, 30), st.integers(1, 4))
@settings(max_examples=40)
def test_first_fit_places_every_piece_once(texts, seq_len, bins):
    config = DataConfig(seq_len=seq_len, shuffle=False, packing="first_fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BINS", bins)
        batches = list(itertools.islice(in_memory(texts, config, bins), 3))  # a batch is one round of the packing
    found = Counter()
    for tokens, ids in ((row, ids) for b in batches for row, ids in zip(b["tokens"], b["segment_ids"], strict=True)):
        real = int((ids > 0).sum())
        assert (ids[real:] == 0).all()
        assert (tokens[real:] == 0).all()
        assert ids[0] == 1
        assert set(np.diff(ids[:real])) <= {0, 1}
        found.update(tokens[ids == number].tobytes() for number in range(1, ids.max() + 1))
    length = seq_len + 1
    pieces = []
    for text in texts:
        tokens = np.array([*text, 0], np.int32)
        pieces += [tokens[start : start + length].tobytes() for start in range(0, len(tokens), length)]
    assert found == Counter(itertools.islice(itertools.cycle(pieces), found.total()))


@pytest.mark.usefixtures("small_windows")
def test_every_byte_once_an_epoch_whatever_the_order(tmp_path, write_corpus):
    texts = write_corpus(20)
    tokens = sum(map(len, texts)) + len(texts)
    (tmp_path / "filler.txt").write_bytes(b"." * (-(tokens + 1) % (6 * 16)))
    config = settings_for(tmp_path)
    expected = np.frombuffer(training_text(config), np.uint8)
    assert expected.size % (6 * 16) == 0  # whole windows of 6 rows
    iterator = train_batches(config, BYTES)
    epochs = [take_rows(iterator, expected.size // 32) for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.bincount(epoch.ravel(), minlength=256), np.bincount(expected, minlength=256))
    plain = take_rows(train_batches(settings_for(tmp_path, shuffle=False), BYTES), expected.size // 32)
    np.testing.assert_array_equal(plain.ravel(), expected)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], plain)


@pytest.mark.usefixtures("small_windows")
def test_first_fit_keeps_documents_whole_and_in_one_process(tmp_path, write_corpus):
    texts = write_corpus(11)
    config = settings_for(tmp_path, batch_size=4, packing="first_fit", seq_len=127, shuffle=False)
    for process in range(2):
        seen = set()
        for batch in itertools.islice(train_batches(config, BYTES, process, 2), 12):
            for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
                seen |= {bytes(row[ids == number].astype(np.uint8)) for number in range(1, ids.max() + 1)}
        assert seen == {text + b"\0" for text in texts[process::2]}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_are_disjoint_and_complete_in_every_epoch(count):
    texts = [f"{number:03d}".encode() for number in range(30)]  # a row of 4 tokens is exactly a document
    config = DataConfig(seq_len=3, seed=7)
    for epoch in range(3):
        found = []
        for process in range(count):
            mine = len(range(process, len(texts), count))
            stream = in_memory(texts, config, rows=1, shard=slice(process, None, count))
            rows = take_rows(itertools.islice(stream, epoch * mine, None), mine)
            found += [bytes(row.astype(np.uint8)[:3]) for row in rows]
        assert sorted(found) == texts


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_restored_position_continues_bit_for_bit(tmp_path, write_corpus, packing, shuffle):
    write_corpus(9)
    config = settings_for(tmp_path, packing=packing, shuffle=shuffle)
    iterator = train_batches(config, BYTES)
    states, batches = [], []
    for _ in range(60):  # 9 documents of 35 bytes: several epochs
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for position in [*range(9), 17, 37, 59]:
        restored = train_batches(config, BYTES)
        restored.set_state(json.loads(states[position]))
        assert json.dumps(restored.get_state()) == states[position]
        for expected in batches[position : position + 5]:
            assert equal(next(restored), expected)
    iterator.set_state(json.loads(states[3]))  # backwards, in the same iterator
    assert equal(next(iterator), batches[3])


@pytest.mark.slow
@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(("workers", "packing"), [(1, "concat"), (2, "first_fit")])
def test_workers_resume_bit_for_bit(tmp_path, write_corpus, workers, packing):
    write_corpus(9)
    config = settings_for(tmp_path, packing=packing, num_workers=workers)
    iterator = train_batches(config, BYTES)
    batches = [next(iterator) for _ in range(7)]
    state = json.dumps(iterator.get_state())
    batches += [next(iterator) for _ in range(9)]
    iterator.close()
    if workers == 1:
        alone = train_batches(settings_for(tmp_path, packing=packing), BYTES)
        assert all(equal(next(alone), expected) for expected in batches)
    restored = train_batches(config, BYTES)
    restored.set_state(json.loads(state))
    assert all(equal(next(restored), expected) for expected in batches[7:])
    restored.close()


WORKER_PROGRAM = """
import multiprocessing, os, signal, sys
from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, train_batches

if __name__ == "__main__":
    config = DataConfig(source=f"text:{sys.argv[1]}/*.txt", train_split="all", seq_len=15, num_workers=1)
    batches = train_batches(config, load_tokenizer("bytes"))
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_end_with_the_program_however_it_ends(tmp_path, write_corpus, end):
    write_corpus(9)
    program = tmp_path / "program.py"
    program.write_text(WORKER_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # The output ends when the last process that holds it does: a worker that outlives its program is a timeout.
    result = subprocess.run(
        [sys.executable, program, tmp_path, end], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == (0 if end == "exit" else -signal.SIGKILL)
    if end == "exit":
        assert result.stderr == ""
    assert int(result.stdout) > 0


def test_closed_batches_say_so(tmp_path, write_corpus):
    write_corpus(3)
    batches = train_batches(settings_for(tmp_path), BYTES)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="the batches were closed"):
        next(batches)


def test_the_same_seed_gives_the_same_batches_and_another_does_not(tmp_path, write_corpus):
    write_corpus(30)
    first, again, other = (
        next(train_batches(settings_for(tmp_path, seed=seed, batch_size=8), BYTES))["tokens"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_position_of_another_stream_is_refused(tmp_path, write_corpus):
    write_corpus(9)
    state = train_batches(settings_for(tmp_path), BYTES).get_state()
    other = train_batches(settings_for(tmp_path, seq_len=7, seed=3), BYTES)
    with pytest.raises(ValueError, match="another stream: seed: saved 0, now 3; seq_len: saved 15, now 7"):
        other.set_state(state)


def test_the_position_of_a_run_that_read_nothing_is_the_beginning(tmp_path, write_corpus):
    write_corpus(9)
    batches, others = (train_batches(settings_for(tmp_path), BYTES) for _ in range(2))
    others.set_state({"streams": []})
    np.testing.assert_array_equal(next(others)["tokens"], next(batches)["tokens"])


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.usefixtures("small_windows")
def test_another_number_of_processes_goes_on_with_the_same_rows(tmp_path, write_corpus, packing):
    write_corpus(9)
    config = settings_for(tmp_path, batch_size=4, packing=packing)
    alone = [train_batches(dataclasses.replace(config, streams=2), BYTES)]
    expected = [next(alone[0])["tokens"] for _ in range(6)]
    processes = [train_batches(config, BYTES, index, 2) for index in range(2)]
    for place, rows in enumerate(expected):
        if place in (2, 4):  # 2 processes, then 1, then 2
            states = json.loads(json.dumps([process.get_state() for process in processes]))
            count = 1 if place == 2 else 2
            processes = [train_batches(config, BYTES, index, count) for index in range(count)]
            for process in processes:
                process.set_state(*states)
        np.testing.assert_array_equal(np.concatenate([next(process)["tokens"] for process in processes]), rows)
    states = [process.get_state() for process in processes]
    for others, message in (
        (train_batches(config, BYTES, 3, 4), "2 streams, which 4 processes cannot share out evenly"),
        (train_batches(dataclasses.replace(config, streams=4), BYTES), "2 streams, found data.streams=4"),
        (processes[0], "no stream 0 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            others.set_state(states[1])


@pytest.mark.parametrize(
    ("options", "text", "process_count", "message"),
    [
        ({"seq_len": 100}, b"short", 1, r"has 6 tokens, fewer than one row of data\.seq_len \+ 1 = 101"),
        ({}, b"long enough for a row", 2, "has 1 documents for 2 streams"),
        (
            {"streams": 3},
            b"long enough for a row",
            1,
            r"data\.streams=3 must be a multiple of the 1 processes and divide",
        ),
        ({"batch_size": 3}, b"long enough for a row", 2, r"data\.batch_size=3 must be a multiple of the 2 processes"),
        ({}, b"long enough for a row \xff", 1, "is not UTF-8: invalid start byte at byte offset 22"),
        ({"source": "text:nowhere/*"}, b"", 1, "matches no file"),
    ],
)
def test_unusable_text_is_refused_at_once(tmp_path, options, text, process_count, message):
    (tmp_path / "only.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        train_batches(settings_for(tmp_path, **options), BYTES, 0, process_count)


def test_bpe_rows_are_the_tokens_of_the_documents(tmp_path, write_corpus):
    texts = write_corpus(12)
    tokenizer = tokenizer_from_json(train(iter(texts), 300))
    config = settings_for(tmp_path, shuffle=False)
    stream = np.concatenate([[*tokenizer.encode(text.decode()), tokenizer.end_of_document] for text in texts])
    got = take_rows(train_batches(config, tokenizer), 6)
    np.testing.assert_array_equal(got.ravel(), np.resize(stream, got.size))


def test_all_windows_predict_every_token_once(tmp_path, write_corpus):
    write_corpus(9)
    config = settings_for(tmp_path)
    stream = np.frombuffer(held_out_text(config), np.uint8)
    batches = eval_batches(config, BYTES, windows=0, batch_size=4)
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
    weights = np.concatenate([batch["weights"] for batch in batches])
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    count = (stream.size - 1) // 15
    assert weights.dtype == np.float32
    assert weights.tolist() == [1.0] * count + [0.0] * (-count % 4)
    assert (tokens[weights == 0] == 0).all()
    real = tokens[weights == 1]
    np.testing.assert_array_equal(real[:, 1:].ravel(), stream[1 : count * 15 + 1])
    np.testing.assert_array_equal(real[:, 0], stream[: count * 15 : 15])


def test_chosen_windows_are_spread_evenly_and_repeat(tmp_path, write_corpus):
    write_corpus(40)
    config = settings_for(tmp_path)
    every = np.concatenate([b["tokens"] for b in eval_batches(config, BYTES, windows=0, batch_size=1)])
    some = eval_batches(config, BYTES, windows=10, batch_size=4)
    assert all(map(equal, some, eval_batches(config, BYTES, windows=10, batch_size=4)))
    assert np.concatenate([b["weights"] for b in some]).tolist() == [1.0] * 10 + [0.0] * 2
    chosen = [number * len(every) // 10 for number in range(10)]
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in some])[:10], every[chosen])
    more_than_there_are = eval_batches(config, BYTES, windows=len(every) + 5, batch_size=1)
    assert len(more_than_there_are) == len(every)


def test_windows_of_packed_documents_have_segments(tmp_path, write_corpus):
    write_corpus(9)
    config = settings_for(tmp_path, packing="first_fit")
    for batch in eval_batches(config, BYTES, windows=0, batch_size=4):
        for tokens, ids, weight in zip(batch["tokens"], batch["segment_ids"], batch["weights"], strict=True):
            ends = np.concatenate([[0], np.cumsum(tokens == 0)[:-1]])
            np.testing.assert_array_equal(ids, (ends + 1) if weight else 0)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_rows_carry_the_bytes_of_their_documents(tmp_path, write_corpus, packing):
    texts = write_corpus(12)
    tokenizer = tokenizer_from_json(train(iter(texts), 300))
    config = settings_for(tmp_path, packing=packing, seq_len=63)
    sizes = {}  # of the tokens from one end of a document to the next
    for batch in itertools.islice(train_batches(config, tokenizer), 100):
        assert batch["bytes"].dtype == np.int32
        assert batch["bytes"].shape == batch["tokens"].shape
        for tokens, counts in zip(batch["tokens"], batch["bytes"], strict=True):
            ends = np.flatnonzero((tokens == tokenizer.end_of_document) & (counts > 0))  # padding has no bytes
            for start, stop in itertools.pairwise(ends + 1):
                text = tokenizer.decode(tokens[start : stop - 1].tolist())
                sizes[text.encode()] = counts[start:stop].sum() - 1
                assert len(text.encode()) == sizes[text.encode()]
    assert len(sizes.keys() & set(texts)) > 3
    held_out = eval_batches(config, tokenizer, windows=0, batch_size=1)
    stream = np.concatenate([batch["bytes"][0, 1:] for batch in held_out])
    assert stream.sum() == pytest.approx(len(held_out_text(config)), abs=60)  # less the first token and the last row


def test_a_held_out_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "only.txt").write_bytes(b"123456789")
    config = settings_for(tmp_path, seq_len=10)
    with pytest.raises(ValueError, match=r"split 'all' .* has 10 tokens, fewer than one row"):
        eval_batches(config, BYTES, windows=0, batch_size=1)


def test_held_out_stream_of_a_large_split_is_spread(tmp_path, write_corpus, monkeypatch):
    texts = write_corpus(20)
    monkeypatch.setattr(held_out, "HELD_OUT_DOCUMENTS", 6)
    assert held_out_text(settings_for(tmp_path)) == b"".join(text + b"\0" for text in texts[::4])


def test_standard_library_rows(stdlib_cache):
    config = DataConfig(cache_dir=str(stdlib_cache))
    batch = next(train_batches(config, BYTES))
    assert batch["tokens"].shape == (8, 513)
    held_out = held_out_text(config)
    assert b"import" in held_out
    rows = np.concatenate([each["tokens"] for each in eval_batches(config, BYTES, windows=128, batch_size=8)])
    assert rows.shape == (128, 513)
    assert all(bytes(row.astype(np.uint8)) in held_out for row in rows[::16])
