"""Run train.py with one accident: `python -m tests.training.drive ACCIDENT STEP [train.py's arguments]`."""

import signal
import sys

import train
from tests import undrawn
from tests.training.runs import strike
from transmamba_jax import data
from transmamba_jax.evaluate import evaluator
from transmamba_jax.training import loop


def main():
    accident, count, *arguments = sys.argv[1:]
    if accident == "kill-at-batch":
        strike(data.BatchIterator, "__next__", signal.SIGKILL, int(count))
    elif accident == "terminate-at-batch":
        strike(data.BatchIterator, "__next__", signal.SIGTERM, int(count))
    elif accident == "interrupt-in-evaluation":
        strike(evaluator, "target_weights", signal.SIGINT, int(count))
    elif accident == "terminate-in-compilation":
        strike(loop, "compile_train_step", signal.SIGTERM, int(count))
    else:
        assert accident == "none"
    with undrawn.patch():
        return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
