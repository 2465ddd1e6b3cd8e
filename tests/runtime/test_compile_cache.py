"""Compiled programs on disk: the second start compiles nothing and computes the same."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import programs
from transmamba_jax.runtime import compile_cache, hardware

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
    (folder,) = (tmp_path / "transmamba_jax" / "programs").iterdir()
    untraced = len(list(folder.glob("*.program")))
    assert untraced == 2  # the initialisation and the step: they are not even traced
    assert hits_again == written - untraced
    assert losses == again
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_programs_of_an_earlier_version_are_found_in_the_cache_of_jax(tmp_path):
    losses, _, _, _ = start(tmp_path / "first", tmp_path)
    (folder,) = (tmp_path / "transmamba_jax" / "programs").iterdir()
    for program in folder.glob("*.program"):
        program.unlink()  # as after an update that changes no program
    for name in ("second", "third"):
        again, _, written, _ = start(tmp_path / name, tmp_path)
        assert written == 0
        assert again == losses
    assert not list(folder.glob("*.program"))


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
    for program in folder.glob("*.program"):
        program.unlink()
    again, hits, written_again, output = start(tmp_path / "second", tmp_path)
    assert (hits, written_again) == (written - 1, 1)
    assert again == losses
    assert "persistent compilation cache entry" not in output


class Lowering:
    """Lower x -> factor * x on the first device, and count how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, factor: float = 2.0) -> jax.stages.Lowered:
        self.count += 1
        function = jax.jit(lambda tree: {"scaled": factor * tree["x"]})
        return function.lower({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})


@pytest.fixture
def lower(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_folder", tmp_path)
    with programs.not_kept():  # each one is compiled here
        yield Lowering()


def run(lower, *key):
    program = compile_cache.compile_or_read(lower, key, jax.devices()[:1])
    return program({"x": jnp.arange(3.0)})["scaled"].tolist()


def test_a_program_of_the_same_key_is_read_and_not_traced(lower, tmp_path):
    assert run(lower, "double") == run(lower, "double") == [0.0, 2.0, 4.0]
    assert lower.count == 1
    assert run(lower, "another key") == [0.0, 2.0, 4.0]
    assert lower.count == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_sources_and_settings_are_part_of_the_key(lower, monkeypatch):
    run(lower, "double")
    with jax.default_matmul_precision("highest"):
        run(lower, "double")
    assert lower.count == 2
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    run(lower, "double")
    assert lower.count == 3
    monkeypatch.setattr(compile_cache, "_sources", lambda: "edited")
    run(lower, "double")
    assert lower.count == 4


def test_a_deserialized_executable_is_not_serialized_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_folder", tmp_path)
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        lower = Lowering()
        assert run(lower, "one start") == [0.0, 2.0, 4.0]
        assert len(list(tmp_path.iterdir())) == 1
        for _ in range(2):
            assert run(lower, "another key, the same module") == [0.0, 2.0, 4.0]
        assert len(list(tmp_path.iterdir())) == 1
        assert lower.count == 3
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_programs_for_other_cores_have_a_folder_of_their_own(monkeypatch):
    folders = set()
    for cores in ([0], [0, 1], [3]):
        monkeypatch.setattr(hardware, "usable_cores", lambda cores=cores: cores)
        folders.add(compile_cache._processor())
    assert len(folders) == 2  # one core is as good as another


def test_programs_without_a_key_are_not_kept(lower, tmp_path):
    for _ in range(2):
        compile_cache.compile_or_read(lower, None, jax.devices()[:1])
    assert lower.count == 2
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_compiled_again(lower, tmp_path):
    run(lower, "double")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert run(lower, "double") == [0.0, 2.0, 4.0]
    assert run(lower, "double") == [0.0, 2.0, 4.0]
    assert lower.count == 2


def test_the_least_recently_used_go_first(lower, tmp_path, monkeypatch):
    run(lower, "a")
    (first,) = tmp_path.iterdir()
    size = first.stat().st_size
    left_behind = tmp_path / "killed.program.123"
    left_behind.write_bytes(b"0" * size)
    monkeypatch.setattr(compile_cache, "_MAX_KEYED_BYTES", int(2.5 * size))
    run(lower, "b")
    (second,) = set(tmp_path.glob("*.program")) - {first}
    for file, used in ((left_behind, 1), (second, 2)):
        os.utime(file, (used, used))
    run(lower, "a")  # read, so `second` is older
    run(lower, "c")
    assert first.exists()
    assert not second.exists()
    assert not left_behind.exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_program_above_the_limit_removes_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_MAX_KEYED_BYTES", 10)
    for used, (name, size) in enumerate([("old", 4), ("recent", 6), ("large", 11)]):
        file = tmp_path / f"{name}.program"
        file.write_bytes(b"0" * size)
        os.utime(file, (used, used))
    compile_cache._remove_oldest(tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == {"old", "recent"}


def test_a_folder_that_is_gone_costs_nothing_else(lower, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_folder", tmp_path / "gone")
    assert run(lower, "double") == run(lower, "double") == [0.0, 2.0, 4.0]
    assert lower.count == 2


def test_what_was_edited_after_the_import_is_not_kept(lower, tmp_path, monkeypatch):
    """The code that is traced is that of the import, and the sources on disk would name it."""
    imported = compile_cache._IMPORTED
    monkeypatch.setattr(compile_cache, "_IMPORTED", 0.0)  # every source is later
    assert run(lower, "double") == [0.0, 2.0, 4.0]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(compile_cache, "_IMPORTED", max(imported, time.time()))
    run(lower, "double")
    assert len(list(tmp_path.iterdir())) == 1
