"""Compiled programs on disk: the second start compiles nothing and computes the same."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys, jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
from transmamba_jax.training.__main__ import main
code = main(sys.argv[1:])
print("HITS", events.count("cache_hits"), "WRITTEN", events.count("cache_misses"))
sys.exit(code)
"""
SMALL = [
    *(
        "--config",
        "tiny",
        "--train.steps",
        "2",
        "--eval.every",
        "0",
        "--checkpoint.every",
        "0",
        "--train.sample-tokens",
        "0",
    ),
    *("--model.num-layers", "1", "--model.transpoints", "0", "--model.d-model", "32", "--model.mlp-dim", "32"),
    *("--optimizer.name", "adamw", "--data.seq-len", "16", "--data.batch-size", "2"),
]


def start(folder: Path, cache: Path, **settings: str) -> tuple[list[float], int, int, str]:
    """Train two steps in a process of its own; return losses, programs read and written, and all that was printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(cache), **settings}
    command = [sys.executable, "-c", TRAIN, *SMALL, "--workdir", str(folder), "--data.cache-dir", str(cache / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    _, hits, _, written = done.stdout.splitlines()[-1].split()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], int(hits), int(written), done.stdout + done.stderr


@pytest.mark.slow
def test_the_second_start_reads_its_programs_and_computes_the_same(tmp_path):
    losses, hits, written, _ = start(tmp_path / "first", tmp_path)
    again, hits_again, written_again, _ = start(tmp_path / "second", tmp_path)
    assert (hits, written_again) == (0, 0)
    assert hits_again == written > 0
    assert losses == again
    (folder,) = (tmp_path / "transmamba_jax" / "programs").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_said_and_costs_nothing_else(tmp_path):
    (tmp_path / "transmamba_jax").write_text("a file where the folder would be")
    losses, hits, written, output = start(tmp_path / "run", tmp_path)
    assert losses
    assert (hits, written) == (0, 0)
    assert "compiled programs are not kept" in output


@pytest.mark.slow
def test_the_settings_of_jax_win(tmp_path):
    _, _, written, _ = start(tmp_path / "off", tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert written == 0
    _, _, written, _ = start(tmp_path / "own", tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own-cache"))
    assert written == len(list((tmp_path / "own-cache").glob("*-cache")))
    assert not (tmp_path / "transmamba_jax" / "programs").exists()


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed(tmp_path):
    losses, _, written, _ = start(tmp_path / "first", tmp_path)
    (folder,) = (tmp_path / "transmamba_jax" / "programs").iterdir()
    program = min(folder.glob("*-cache"))
    program.write_bytes(program.read_bytes()[:100])
    program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    again, hits, written_again, output = start(tmp_path / "second", tmp_path)
    assert (hits, written_again) == (written - 1, 1)
    assert again == losses
    assert "persistent compilation cache entry" not in output
