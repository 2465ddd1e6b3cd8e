"""Test positions and processes of jsonl, Parquet and Hugging Face sources, also after a kill -9."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_row_sources import KINDS, make, rows_of
from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, pipeline, train_batches
from transmamba_jax.data.sources import open_documents

BYTES = load_tokenizer("bytes")
TEXTS = [f"<{number}>" + "é" * (number % 9) for number in range(45)]
OPTIONS = {"train_split": "all", "seq_len": 31, "batch_size": 4}


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a window hold a few rows, so that short tests cross many of them."""
    monkeypatch.setattr(pipeline, "WINDOW_BYTES", 100)
    monkeypatch.setattr(pipeline, "BINS", 3)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_position_continues_bit_for_bit(tmp_path: Path, kind: str, packing: str) -> None:
    config = make(kind, tmp_path, rows_of(TEXTS[:20]), rows_of(TEXTS[20:]), packing=packing, **OPTIONS)
    batches = train_batches(config, BYTES)
    states, expected = [], []
    for _ in range(20):  # several epochs
        states.append(json.dumps(batches.get_state()))
        expected.append(next(batches))
    for place in (0, 3, 17):
        again = train_batches(config, BYTES)
        again.set_state(json.loads(states[place]))
        for batch in expected[place : place + 3]:
            found = next(again)
            assert all(np.array_equal(found[name], batch[name]) for name in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_read_disjoint_rows(tmp_path: Path, kind: str) -> None:
    config = make(kind, tmp_path, rows_of(TEXTS), packing="first_fit", shuffle=False, **{**OPTIONS, "seq_len": 63})
    seen = []
    for process in range(2):
        batches = itertools.islice(train_batches(config, BYTES, process, 2), 12)
        rows = [(row, ids) for batch in batches for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True)]
        documents = {bytes(row[ids == n].tolist()) for row, ids in rows for n in range(1, ids.max() + 1)}
        seen.append(documents)
    assert seen == [{text.encode() + b"\0" for text in TEXTS[process::2]} for process in range(2)]


PROGRAM = """
import hashlib, json, os, signal, sys
from pathlib import Path
from transmamba_jax.config import DataConfig
from transmamba_jax.data import load_tokenizer, pipeline, row_index, train_batches

if __name__ == "__main__":
    options, state, end = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    pipeline.WINDOW_BYTES = 100
    if end == "indexing":
        row_index.RowWriter.broken = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    batches = train_batches(DataConfig(**options), load_tokenizer("bytes"))
    if state.exists():
        batches.set_state(json.loads(state.read_text()))
    for number in range(5):
        print(hashlib.sha256(next(batches)["tokens"].tobytes()).hexdigest(), flush=True)
        state.write_text(json.dumps(batches.get_state()))
    if end == "reading":
        next(batches)
        os.kill(os.getpid(), signal.SIGKILL)
    batches.close()
"""


def run(config: DataConfig, folder: Path, end: str) -> tuple[int, list[str]]:
    """Run the program; return its exit code and the checksums of its batches."""
    names = ("source", "cache_dir", "num_workers", "on_error", *OPTIONS)
    options = json.dumps({name: getattr(config, name) for name in names})
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, folder / "program.py", options, folder / "state.json", end]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert result.returncode < 0 or result.stderr == ""
    return result.returncode, result.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("jsonl.gz", 1), ("hf", 0)])
def test_a_killed_program_continues_bit_for_bit(tmp_path: Path, kind: str, workers: int) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    config = make(kind, folder, rows_of(TEXTS), num_workers=workers, **OPTIONS)
    killed, first = run(config, tmp_path, "reading")
    ended, second = run(config, tmp_path, "exit")
    assert (killed, ended) == (-signal.SIGKILL, 0)
    batches = train_batches(config, BYTES)
    whole = [hashlib.sha256(next(batches)["tokens"].tobytes()).hexdigest() for _ in range(10)]
    batches.close()
    assert first + second == whole


def test_an_index_that_was_killed_is_built_again(tmp_path: Path) -> None:
    config = make("parquet", tmp_path, [*rows_of(TEXTS), {"id": 45, "text": None}], on_error="skip", **OPTIONS)
    assert run(config, tmp_path, "indexing") == (-signal.SIGKILL, [])
    rows = tmp_path / "cache" / "rows"
    assert len(list(rows.glob("*.partial"))) == 1
    documents = open_documents(config, "all")
    assert [documents[index] for index in range(len(documents))] == [text.encode() for text in TEXTS]
    assert not list(rows.glob("*.partial"))
