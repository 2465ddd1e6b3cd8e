"""Processes that have accidents. `python -m tests.faults.drive` imports everything once and forks a process per task.

A task is a JSON line {"run": name of a function here, "arguments": {...}, "environment": {...}, "output": file}; the
answer is the exit status as `subprocess` reports it. No device is touched before the fork.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

import train as command
from tests.faults import damage
from tests.training.runs import before_call, strike
from tests.training.support import Little
from transmamba_jax import checkpoint_manifest, checkpoint_steps, data, evaluate, run_lock
from transmamba_jax.training import loop

POISON = 255  # a byte that the text does not have
KILL_POINTS = {
    "start": (run_lock, "hold"),
    "preparation": (checkpoint_steps, "make_room"),
    "data": (ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize"),
    "manifest": (checkpoint_manifest, "write"),
    "manifest-rename": (os, "fsync"),
    "deletion": (checkpoint_steps, "delete_leftovers"),
}


class Poisoned(Little):
    """NaN for every row of a microbatch that has the poison in it."""

    def hidden(self, tokens, segment_ids=None):
        x = super().hidden(tokens, segment_ids)
        return x + jnp.where(jnp.any(tokens == POISON), jnp.nan, 0.0)


def run_training(arguments, accident="none", at=0):
    """Run train.py on a model that compiles in a second, with one accident."""
    loop.TransMamba = Poisoned
    if accident.startswith("kill-in-"):
        strike(*KILL_POINTS[accident.removeprefix("kill-in-")], signal.SIGKILL, at)
    elif accident == "kill-after":
        threading.Timer(at, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif accident == "terminate-in-step":
        strike(data.BatchIterator, "__next__", signal.SIGTERM, at)
    elif accident == "terminate-in-evaluation":
        strike(evaluate, "_target_weights", signal.SIGTERM, at)
    elif accident == "terminate-in-compilation":
        strike(loop, "make_train_step", signal.SIGTERM, at)
    elif accident == "poison-row":
        poison(at, slice(0, 1))
    elif accident == "poison-all":
        poison(at, slice(None))
    elif accident == "no-space":
        usage = checkpoint_steps.shutil.disk_usage
        calls = []
        checkpoint_steps.shutil.disk_usage = lambda path: (
            calls.append(path),
            usage(path)._replace(free=1000) if len(calls) in at else usage(path),
        )[1]
    elif accident.startswith("read-only-in-"):
        make_read_only(*KILL_POINTS[accident.removeprefix("read-only-in-")], *at)
    elif accident == "wait-in-step":
        wait_in_step(Path(at))
    else:
        assert accident == "none"
    return command.main(arguments)


def run_damage(folder):
    """Damage copies of a checkpoint folder in every way and write what a restore did."""
    return damage.main(Path(folder))


def make_read_only(owner, name, count, directory):
    """Take the write permission from a directory when `owner.name` is called for the `count`-th time.

    Root may write everywhere, by capabilities that this process gives up first, where it has them.
    """
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
    before_call(owner, name, count, lambda: Path(directory).chmod(0o555))


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


def serve():
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 70
            output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            null = os.open(os.devnull, os.O_RDONLY)
            for target, source in ((0, null), (1, output), (2, output)):
                os.dup2(source, target)
            os.environ.update(task["environment"])
            try:
                status = globals()[f"run_{task['run']}"](**task["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


if __name__ == "__main__":
    serve()
