"""Processes that have accidents; `python -m tests.faults.drive` serves them (tests/forks.py)."""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

import train as command
from tests.faults import damage
from tests.forks import serve
from tests.training.runs import before_call, strike
from tests.training.support import Little
from transmamba_jax import checkpoint, data
from transmamba_jax.checkpoint import manifest as checkpoint_manifest
from transmamba_jax.checkpoint import steps as checkpoint_steps
from transmamba_jax.evaluate import evaluator
from transmamba_jax.training import completion, run_lock

POISON = 255  # a byte that the text does not have
KILL_POINTS = {
    "start": (run_lock, "hold"),
    "preparation": (checkpoint_steps, "ensure_space"),
    "data": (ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize"),
    "manifest": (checkpoint_manifest, "write"),
    "manifest-rename": (os, "fsync"),
    "deletion": (checkpoint_steps, "delete_leftovers"),
    "report": (completion, "write_report"),
}


class Poisoned(Little):
    """NaN for every row of a microbatch that has the poison in it."""

    def hidden(self, tokens, segment_ids=None):
        x = super().hidden(tokens, segment_ids)
        return x + jnp.where(jnp.any(tokens == POISON), jnp.nan, 0.0)


def run_training(arguments, accident="none", at=0):
    """Run train.py on a model that compiles in a second, with one accident."""
    if accident.startswith("kill-in-"):
        strike(*KILL_POINTS[accident.removeprefix("kill-in-")], signal.SIGKILL, at)
    elif accident == "kill-after-save":
        count, seconds = at
        kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        before_call(checkpoint.Checkpointer, "save", count, kill.start)
    elif accident == "terminate-in-step":
        strike(data.BatchIterator, "__next__", signal.SIGTERM, at)
    elif accident == "terminate-in-evaluation":
        strike(evaluator, "target_weights", signal.SIGTERM, at)
    elif accident == "terminate-in-compilation":
        threading.Thread(target=terminate_while_compiling, daemon=True).start()
    elif accident == "poison-row":
        poison(at, slice(0, 1))
    elif accident == "poison-all":
        poison(at, slice(None))
    elif accident == "no-space":
        usage = shutil.disk_usage
        calls = []
        shutil.disk_usage = lambda path: (
            calls.append(path),
            usage(path)._replace(free=1000) if len(calls) in at else usage(path),
        )[1]
    elif accident.startswith("read-only-in-"):
        make_read_only(*KILL_POINTS[accident.removeprefix("read-only-in-")], *at)
    elif accident == "full-disk":
        step, failed_saves, workdir, disk = at
        fill, free = limit_files(Path(workdir) / "metrics.jsonl") if disk is None else fill_disk(Path(disk) / "filler")
        before_call(data.BatchIterator, "__next__", step, lambda: (wait_for_saves(Path(workdir)), fill()))
        before_call(checkpoint.Checkpointer, "_failure", failed_saves, free)
    elif accident == "wait-in-step":
        wait_in_step(Path(at))
    else:
        assert accident == "none"
    return command.main(arguments, model=Poisoned)


def run_damage(folder):
    """Damage copies of a checkpoint folder in every way and write what a restore did."""
    return damage.main(Path(folder))


def terminate_while_compiling():
    """Send SIGTERM when the main thread is in the compiler for the train step."""
    main, inside = threading.main_thread().ident, {"_compile", "backend_compile_and_load"}
    while True:
        frame, names = sys._current_frames()[main], set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        if inside <= names:
            return os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)


def make_read_only(owner, name, count, directory):
    """Take the write permission from a directory when `owner.name` is called for the `count`-th time.

    Root may write everywhere, by capabilities that this process gives up first, where it has them.
    """
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
    before_call(owner, name, count, lambda: Path(directory).chmod(0o555))


def fill_disk(filler):
    """Return how to write a file that takes all the space there is, and how to remove it."""

    def fill():
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))

    return fill, filler.unlink


def limit_files(metrics):
    """Return how to let no file grow beyond 128 KiB, which metrics have already, and how to end that.

    What this process prints is shorter than that, and the arrays of a checkpoint are longer.
    """
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def fill():
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 1, "filler": "." * 2**17}) + "\n")
        limit(metrics.stat().st_size)

    return fill, lambda: limit(hard)


def wait_for_saves(workdir):
    while any(workdir.glob("checkpoints/saving-*")):
        time.sleep(0.01)


def wait_in_step(file):
    """Make a file at the first step and wait until it is gone."""
    original, waited = data.BatchIterator.__next__, []

    def wait(batches):
        if not waited:
            waited.append(True)
            file.touch()
            while file.exists():
                time.sleep(0.05)
        return original(batches)

    data.BatchIterator.__next__ = wait


def poison(step, rows):
    """Put the poison into rows of the batch of a step."""
    original, count = data.BatchIterator.__next__, 0

    def poisoned(batches):
        nonlocal count
        count += 1
        batch = original(batches)
        if count == step:
            batch = {**batch, "tokens": batch["tokens"].copy()}
            batch["tokens"][rows, 0] = POISON
        return batch

    data.BatchIterator.__next__ = poisoned


if __name__ == "__main__":
    serve({"training": run_training, "damage": run_damage})
