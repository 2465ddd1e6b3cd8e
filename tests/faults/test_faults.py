"""Accidents, each in a process of its own: what is said, and that nothing good is lost."""

import json
import math
import random
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from tests.faults import damage
from tests.faults.conftest import MODULE
from tests.forks import Server
from tests.training.runs import assert_same_end, metrics_of
from transmamba_jax import checkpoint
from transmamba_jax.training.loop import EXIT_NOT_SAVED
from transmamba_jax.training.preemption import EXIT_PREEMPTED

AXES = "data", "fsdp", "context", "tensor"
SAVE_SECONDS = 0.2  # about what a save of the little run takes, most of it in the background


def good(workdir):
    """Return the steps that `verify` finds good; every complete one has to be."""
    folder = workdir / "checkpoints"
    for step in checkpoint.complete_steps(folder):
        checkpoint.verify(folder / str(step))
    return checkpoint.complete_steps(folder)


@pytest.fixture(name="report", scope="module")
def _report(server):
    folder = server.folder / "damage"
    folder.mkdir()
    server.send("damage", {"folder": str(folder)})
    server.receive(0)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


FILE_SAID = {
    "flip": "has other bytes than were saved",
    "truncate": r"has [\d,]+ bytes, saved were",
    "delete": "is missing",
}
UNREADABLE = "no leaf of params can be read, such as params/large cannot be read"
LEAF_SAID = {
    "flip structure": "params/small is missing; ",
    "truncate structure": UNREADABLE,
    **{f"{harm} {file}": UNREADABLE for harm in FILE_SAID for file in ("index", "index node")},
    **{f"flip array{where}": "params/large has other values than were saved" for where in ("", " at 0.01", " at 0.3")},
    "flip array at 0.99": "params/large has other values than were saved",
    "truncate array": "params/large cannot be read",
    "delete array": "params/large cannot be read",
    "flip manifest": r"manifest\.json is damaged: its checksum differs",
    "truncate manifest": r"manifest\.json is damaged: JSONDecodeError",
    "delete manifest": r"it has no manifest\.json: its save did not finish, or the file was deleted",
    "wrong values": "params/small has other values than were saved",
    "wrong dtype": r"params/small is bfloat16\[3,5\], saved was float32\[3,5\]",
    "wrong shape": r"params/small is float32\[5,3\], saved was float32\[3,5\]",
    "missing leaf": "params/small is missing",
}


def said(name):
    """Return what the line of a case has to match: what it says of leaves, then of the file that was changed."""
    harm, _, file = name.partition(" ")
    # A flipped bit in an array does not change the size of its file, which has no checksum of its own.
    if file not in damage.FILES or file == "manifest" or name == "flip array":
        return LEAF_SAID[name]
    pattern = re.escape(damage.FILES[file]).replace(r"\*", "[0-9a-f]+")
    return f"{LEAF_SAID.get(name, '')}.*{pattern} {FILE_SAID[harm]}"


@pytest.mark.parametrize(
    "name", [name for name in damage.cases() if name not in ("nothing", "pickles", "renamed step")]
)
def test_a_damaged_step_is_skipped_with_a_line_and_kept(report, name):
    case = report[name]
    (line,) = case["lines"]
    assert re.match(f"checkpoint 8 skipped: {said(name)}", line), line
    assert (case["step"], case["same"], case["kept"]) == (3, True, True)
    code, text = case["verify"]
    assert code == 1
    assert "step 3: good" in text
    assert "step 8: DAMAGED" in text


def test_a_step_under_another_name_and_pickles_in_the_directory(report):
    assert report["renamed step"]["lines"] == ["checkpoint 9 skipped: manifest.json belongs to step 8"]
    for name in ("nothing", "pickles"):
        case = report[name]
        assert (case["step"], case["same"], case["lines"], case["sprung"]) == (8, True, [], False)
        assert case["verify"][0] == 0


def test_a_run_goes_on_from_the_newest_good_step_and_takes_the_place_of_the_damaged_one(server, straight):
    workdir = server.folder / "newest-bad"
    shutil.copytree(straight, workdir)
    damage.flip(workdir / "checkpoints" / "12" / "data" / "metadata")
    text = server.train(workdir)
    assert "checkpoint 12 skipped: data/metadata has other bytes than were saved" in text
    assert "continuing from step 8" in text
    assert "checkpoint 12 was damaged or not complete: moved to" in text
    assert good(workdir) == [8, 12]
    assert (workdir / "checkpoints" / "rejected-12").is_dir()
    assert_same_end(workdir, straight, 12)


def test_a_run_whose_steps_are_all_damaged_is_refused(server, straight):
    workdir = server.folder / "all-bad"
    shutil.copytree(straight, workdir)
    for step in ("8", "12"):
        damage.flip(workdir / "checkpoints" / step / "config" / "metadata")
    metrics = (workdir / "metrics.jsonl").read_bytes()
    text = server.train(workdir, expect=2)
    assert "none of the checkpoints 12, 8" in text
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("point", "count", "left", "line"),
    [
        ("data", 8, [4], "continuing from step 4"),
        ("manifest", 2, [4], "checkpoint 8: its save did not finish; what it left is deleted"),
        ("manifest-rename", 2, [], "checkpoint 4: its save did not finish; what it left is deleted"),
        ("deletion", 4, [8, 12], "continuing from step 12"),
    ],
)
def test_killed_during_a_save(server, straight, point, count, left, line):
    workdir = server.folder / f"killed-{point}"
    server.train(workdir, accident=f"kill-in-{point}", at=count, expect=-signal.SIGKILL)
    assert good(workdir) == left
    text = server.train(workdir)
    assert line in text
    assert "taking the lock over" in text
    assert good(workdir) == [8, 12]
    assert not [path for path in (workdir / "checkpoints").iterdir() if path.name.startswith(("saving", "deleting"))]
    assert_same_end(workdir, straight, 12)


@pytest.mark.parametrize(
    ("where", "at", "saved"), [("compilation", 1, [0]), ("step", 7, [4, 7]), ("evaluation", 1, [4, 6])]
)
def test_terminated(server, straight, where, at, saved):
    workdir = server.folder / f"terminated-{where}"
    text = server.train(workdir, accident=f"terminate-in-{where}", at=at, expect=EXIT_PREEMPTED)
    assert f"stopped at step {saved[-1]}; the same command continues from there" in text
    assert good(workdir) == saved
    server.train(workdir)
    assert_same_end(workdir, straight, 12)


def test_a_save_without_space_is_an_alarm_and_the_run_goes_on(server, straight):
    workdir = server.folder / "no-space"
    text = server.train(workdir, accident="no-space", at=[2])
    assert "ALARM: checkpoint 8 was not saved: 4 MiB are needed, 0 MiB are free in" in text
    assert "Failed saves: 1. The checkpoints are [4]" in text
    assert good(workdir) == [4, 12]
    alarms = [line for line in metrics_of(workdir) if "checkpoint/failed_saves" in line]
    assert alarms == [{"step": 8, "checkpoint/failed_saves": 1}]
    shutil.rmtree(workdir)
    text = server.train(workdir, accident="no-space", at=[3, 4], expect=EXIT_NOT_SAVED)
    assert "step 12 is NOT saved; the checkpoints are [4, 8]" in text
    assert good(workdir) == [4, 8]
    server.train(workdir)
    assert good(workdir) == [8, 12]
    found, expected = (checkpoint.restore(folder / "checkpoints") for folder in (workdir, straight))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("kind", ["limit", pytest.param("tmpfs", marks=pytest.mark.faults)])
def test_a_disk_that_fills_up_in_a_run_and_one_that_stays_full(server, kind):
    disk = server.folder / kind
    disk.mkdir()
    # Where only root may mount, a limit on the size of files stands for the disk here too.
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)]
    mounted = kind == "tmpfs" and subprocess.run(mount, capture_output=True).returncode == 0
    workdir, place = disk / "run", str(disk) if mounted else None
    lost = r"ALARM: metrics of step [5-9] wait for the next line: \[Errno (27|28)\]"
    options = "--eval.every", 1, "--model.d-model", 128
    steps = lambda name: [line["step"] for line in metrics_of(workdir) if name in line]
    try:
        text = server.train(workdir, *options, accident="full-disk", at=[6, 1, str(workdir), place])
        assert re.search(lost, text), text
        assert "ALARM: checkpoint 8 was not saved: " in text
        assert "complete: step 12 of 12" in text
        assert good(workdir) == [4, 12]
        assert steps("loss") == steps("eval/loss") == [*range(1, 13)]
        shutil.rmtree(workdir)

        at = [6, 9, str(workdir), place]
        text = server.train(workdir, *options, accident="full-disk", at=at, expect=EXIT_NOT_SAVED)
        assert re.search(lost, text), text
        assert "step 12 is NOT saved; the checkpoints are [4]" in text
        assert text.splitlines()[-1].startswith("train.py: [Errno "), text
        (disk / "filler").unlink(missing_ok=True)
        assert "continuing from step 4" in server.train(workdir, *options)
        assert good(workdir) == [8, 12]
        assert steps("loss") == steps("eval/loss") == [*range(1, 13)]
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("point", "directory", "line"),
    [
        ("report", "", "step 12 of 12 is saved, but the report is not written: "),
        ("start", "checkpoints/deleting-4", "train.py: [Errno 13] Permission denied: "),
    ],
)
def test_a_file_that_cannot_be_written_ends_a_run_with_a_line(server, straight, point, directory, line):
    workdir = server.folder / f"no-file-{point}"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "report")
    (workdir / "checkpoints" / "deleting-4" / "params").mkdir(parents=True)
    text = server.train(
        workdir, accident=f"read-only-in-{point}", at=[1, str(workdir / directory)], expect=EXIT_NOT_SAVED
    )
    assert line in text
    assert "Traceback" not in text
    (workdir / directory).chmod(0o755)
    assert "complete: step 12 of 12" in server.train(workdir)
    assert (workdir / "report" / "index.html").exists()
    assert_same_end(workdir, straight, 12)


@pytest.mark.parametrize(
    ("point", "count", "directory", "lines", "left", "code"),
    [
        (
            "preparation",
            2,
            "checkpoints",
            ("ALARM: checkpoint 8 was not saved: ", "saving-8'. Failed saves: 1. The checkpoints are [4]"),
            [4],
            EXIT_NOT_SAVED,
        ),
        ("data", 8, "checkpoints", ("ALARM: checkpoint 8 was not saved: ", "checkpoints/8'"), [4], EXIT_NOT_SAVED),
        ("manifest", 2, "checkpoints/8", ("ALARM: checkpoint 8 was not saved: ", "manifest.json"), [4, 12], 0),
        ("deletion", 4, "checkpoints", ("older checkpoints could not be deleted: ", "deleting-4'"), [8, 12], 0),
    ],
)
def test_a_directory_that_becomes_read_only(server, straight, point, count, directory, lines, left, code):
    workdir = server.folder / f"read-only-{point}"
    folder = workdir / directory
    text = server.train(workdir, accident=f"read-only-in-{point}", at=[count, str(folder)], expect=code)
    for line in (*lines, "[Errno 13] Permission denied"):
        assert line in text
    assert ("step 12 is NOT saved; the checkpoints are [4]" in text) == (code != 0)
    assert good(workdir) == left
    folder.chmod(0o755)
    if point == "preparation":
        assert "continuing from step 4" in server.train(workdir)
        assert good(workdir) == [8, 12]
    if left[-1] == 12 or point == "preparation":
        found, expected = (checkpoint.restore(folder / "checkpoints") for folder in (workdir, straight))
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_work_directory_that_is_read_only_is_refused(server, straight):
    workdir = server.folder / "read-only"
    shutil.copytree(straight, workdir)
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    (workdir / "run.lock").chmod(0o444)
    text = server.train(workdir, accident="read-only-in-start", at=[1, str(workdir)], expect=2)
    assert f"workdir {workdir} cannot be written: Permission denied; use another --workdir" in text
    workdir.chmod(0o755)
    assert files == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rows", ["row", "all"])
def test_nan_in_one_microbatch_or_all_is_never_saved(server, rows):
    workdir = server.folder / f"poison-{rows}"
    text = server.train(workdir, accident=f"poison-{rows}", at=8)
    assert "step 8 skipped: loss nan" in text
    assert good(workdir) == [4, 12]
    assert [line["skipped_steps"] for line in metrics_of(workdir) if "loss" in line] == [0] * 7 + [1] * 5
    for step in (4, 12):
        saved = checkpoint.restore(workdir / "checkpoints", step)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(saved.params))


@pytest.mark.slow
def test_two_runs_in_one_directory_and_half_a_lock(server, straight):
    workdir = server.folder / "locked"
    shutil.copytree(straight, workdir)
    lock, waiting = workdir / "run.lock", server.folder / "waiting"
    other = Server(MODULE, server.folder)
    arguments = server.arguments(workdir, "--train.steps", 16)
    other.send("training", {"arguments": arguments, "accident": "wait-in-step", "at": str(waiting)})
    while not waiting.exists():
        assert other.process.poll() is None
    text = server.train(workdir, expect=2)
    assert f"{workdir} belongs to another run: process " in text
    assert "is still running; stop it, or use another --workdir" in text
    waiting.rename(server.folder / "go-on")
    assert "complete: step 16" in other.receive(0)[0]
    other.stop()
    assert lock.read_text(encoding="utf-8") == ""
    assert good(workdir) == [12, 16]

    lock.write_text('{"host": "cut off', encoding="utf-8")
    assert 'is not readable (\'{"host": "cut off\'): taking it over' in server.train(workdir, "--train.steps", 16)


def test_configs_that_are_refused(server, straight):
    workdir = server.folder / "refused"
    shutil.copytree(straight, workdir)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    saved, sprung = (workdir / "config.yaml").read_text(encoding="utf-8"), workdir / "sprung"
    (workdir / "config.yaml").write_text(f"{saved}x: !!python/object/apply:os.mkdir [{sprung}]\n", encoding="utf-8")
    text = server.train(workdir, expect=2)
    assert "is not plain YAML: could not determine a constructor for the tag" in text
    assert not sprung.exists()
    (workdir / "config.yaml").write_text(saved, encoding="utf-8")
    text = server.train(workdir, "--data.num-workers", 1, "--train.steps", 16, expect=2)
    assert "the saved data position belongs to another stream: num_workers: saved 0, now 1" in text
    text = server.train(workdir, "--model.d-model", 16, expect=2)
    assert "model.d_model: 8 -> 16" in text
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    text = server.train(workdir, "--train.steps", 6)
    assert "continuing from step 12, beyond train.steps=6: nothing is left to train" in text
    assert good(workdir) == [8, 12]


def test_a_partial_restore_loads_what_matches_and_lists_the_rest(server, straight):
    workdir = server.folder / "partial"
    shutil.copytree(straight, workdir)
    options = "--checkpoint.partial", "True", "--optimizer.name", "muon", "--data.seq-len", 10, "--train.steps", 13
    text = server.train(workdir, *options)
    assert "not loaded from checkpoint 12:\n" in text
    assert "state/opt_state/" in text
    assert "unexpected: state/opt_state/" in text
    assert "seq_len: saved 12, now 10: the data start from the beginning" in text
    assert "params/" not in text.partition("not loaded")[2]
    assert good(workdir) == [12, 13]
    first = [line for line in metrics_of(workdir) if "loss" in line][-1]
    assert first["step"] == 13
    assert first["loss"] < 5.0


@pytest.mark.slow
def test_a_run_moves_between_meshes(server):
    steady = "--optimizer.final-learning-rate", 1e-2, "--model.num-heads", 4, "--model.num-groups", 4
    server.train(server.folder / "steady", *steady, "--train.accumulation", 1)
    workdir = server.folder / "meshes"
    for steps, *sizes in ((2, 2, 4, 1, 1), (4, 1, 1, 1, 4), (6, 1, 1, 2, 1), (8, 1, 1, 1, 1), (12, 1, 2, 2, 2)):
        mesh = [part for axis, size in zip(AXES, sizes, strict=True) for part in (f"--mesh.{axis}", size)]
        options = *steady, *mesh, "--train.steps", steps, "--train.accumulation", 1
        text = server.train(workdir, *options, devices=math.prod(sizes))
        assert f"compiling for {math.prod(sizes)} x cpu" in text
    found, expected = (checkpoint.restore(folder / "checkpoints") for folder in (workdir, server.folder / "steady"))
    assert found.data_states == expected.data_states
    losses = [[line["loss"] for line in metrics_of(w) if "loss" in line] for w in (workdir, server.folder / "steady")]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves((each.params, each.state)) for each in (found, expected)), strict=True):
        np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.faults
def test_killed_at_fifty_random_moments_of_a_save(server, straight):
    moments, cut = random.Random(0), 0
    workdir = server.folder / "random"
    arguments = server.arguments(workdir, "--checkpoint.every", 1, "--eval.every", 0)
    for index in range(50):
        shutil.rmtree(workdir, ignore_errors=True)
        for saves in (moments.randint(1, 12), moments.randint(1, 6)):
            at = [saves, moments.uniform(0, SAVE_SECONDS)]
            server.send("training", {"arguments": arguments, "accident": "kill-after-save", "at": at})
            (code,), (text,) = server.wait()
            assert code in (0, -signal.SIGKILL), text
            before = good(workdir)
            cut += any((workdir / "checkpoints").glob("saving-*"))
        server.send("training", {"arguments": arguments})
        (text,) = server.receive(0)
        assert not before or f"continuing from step {before[-1]}" in text, index
        found, expected = (checkpoint.restore(folder / "checkpoints") for folder in (workdir, straight))
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert cut >= 50  # of a hundred
