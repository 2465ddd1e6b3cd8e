"""Run the study command with a model that compiles in a second, and kill it.

`python -m tests.study.drive BATCH ARGUMENTS`: the process kills itself when it reads that batch, counted over the
cells; 0: never.
"""

import functools
import signal
import sys

from tests import undrawn
from tests.training.runs import strike
from tests.training.support import Little
from transmamba_jax import data
from transmamba_jax.config import Config
from transmamba_jax.study import __main__ as command
from transmamba_jax.study import runner
from transmamba_jax.training.loop import train


def little(config: Config) -> int:
    return train(config, Little(config.model))


def main() -> int:
    batch, *arguments = sys.argv[1:]
    if int(batch):
        strike(data.BatchIterator, "__next__", signal.SIGKILL, int(batch))
    runner.run_study = functools.partial(runner.run_study, train_cell=little)
    with undrawn.patch():
        return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
