"""Run train.py with one accident: `python -m tests.training.drive ACCIDENT STEP [train.py's arguments]`."""

import os
import signal
import sys

import train
from transmamba_jax import data, evaluate
from transmamba_jax.training import loop


def _strike(owner, name, number, count):
    """Send this process a signal when `owner.name` is called for the `count`-th time."""
    original, calls = getattr(owner, name), 0

    def struck(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, struck)


def main():
    accident, count, *arguments = sys.argv[1:]
    if accident == "kill-at-batch":
        _strike(data.BatchIterator, "__next__", signal.SIGKILL, int(count))
    elif accident == "terminate-at-batch":
        _strike(data.BatchIterator, "__next__", signal.SIGTERM, int(count))
    elif accident == "interrupt-in-evaluation":
        _strike(evaluate, "_target_weights", signal.SIGINT, int(count))
    elif accident == "terminate-in-compilation":
        _strike(loop, "make_train_step", signal.SIGTERM, int(count))
    else:
        assert accident == "none"
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
