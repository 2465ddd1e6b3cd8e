"""The standard library data set: complete, split by file, prepared once, whoever comes at the same time."""

import multiprocessing
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data.prepared import is_complete
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.splits import SPLITS
from transmamba_jax.data.stdlib_dataset import prepare, source_files


def directory_in(cache: Path) -> Path:
    return cache / "python_stdlib" / "{}.{}.{}".format(*sys.version_info[:3])


def test_every_source_file_is_in_one_split(stdlib_cache):
    found = Counter()
    sizes = {}
    for split in SPLITS:
        documents = open_documents(DataConfig(cache_dir=str(stdlib_cache)), split)
        texts = [documents[index] for index in range(len(documents))]
        found.update(texts)
        sizes[split] = sum(map(len, texts))
    root = Path(sysconfig.get_path("stdlib"))
    expected = Counter(path.read_bytes().replace(b"\r\n", b"\n") for path in source_files(root))
    # A file that declares another encoding is stored as UTF-8, so a few may differ in their bytes.
    assert sum(found.values()) == sum(expected.values())
    assert sum((expected - found).values()) <= 3
    assert sizes["train"] > 5_000_000
    assert min(sizes["validation"], sizes["test"]) > 200_000


def test_tests_and_installed_packages_are_left_out():
    root = Path(sysconfig.get_path("stdlib"))
    parts = {part for path in source_files(root) for part in path.relative_to(root).parts[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert {"json", "asyncio"} <= parts


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no source files"):
        source_files(tmp_path)


@pytest.mark.usefixtures("no_network")
def test_second_preparation_finds_the_first(stdlib_cache):
    before = {path: path.stat().st_mtime_ns for path in directory_in(stdlib_cache).iterdir()}
    assert prepare(stdlib_cache) == directory_in(stdlib_cache)
    assert {path: path.stat().st_mtime_ns for path in directory_in(stdlib_cache).iterdir()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_half_prepared_is_redone(tmp_path):
    directory = directory_in(tmp_path)
    leftover = directory.parent / f"incomplete.ABC123_{directory.name}"
    for folder in (directory, leftover):
        folder.mkdir(parents=True)
        (folder / "python_stdlib-train.array_record-00000-of-00001").write_bytes(b"half")
    prepare(tmp_path)
    assert is_complete(directory)
    assert not leftover.exists()
    assert open_documents(DataConfig(cache_dir=str(tmp_path)), "train")[0]
    next(directory.glob("*-test.*")).unlink()
    assert not is_complete(directory)


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from transmamba_jax.data.stdlib_dataset import prepare; "
        "print('ready', flush=True); sys.stdin.readline(); print(prepare(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [f"{directory_in(tmp_path)}\n"] * 2
    assert is_complete(directory_in(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python_stdlib", "python_stdlib.lock"]
    assert multiprocessing.active_children() == []
