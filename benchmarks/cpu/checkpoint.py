"""Measure the cost of a checkpoint's manifest beside the save: `python -m benchmarks.cpu.checkpoint`.

Saves the training state of a paper config (float32 parameters and the optimizer's two moments, random numbers) with and
without the checksums of its arrays, in turn, and prints for each: the time until the training thread continues, and
until the step is on disk; then the ratio of the time that the checksums take alone to the save's. The disk's cache is
flushed before each save is timed, so that one does not pay for another's writes. Goal: 0.10, off the training thread.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from transmamba_jax import checkpoint, config_io, sharding
from transmamba_jax.checkpoint import manifest as manifests
from transmamba_jax.config import CheckpointConfig, Config
from transmamba_jax.model import TransMamba
from transmamba_jax.training import metrics
from transmamba_jax.training.step import abstract_state

ROOT = Path(__file__).parents[2]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    """The part of a training state that is saved."""

    params: Any
    opt_state: Any


def make_state(config: Config) -> State:
    """Make random numbers in the shapes of a config's parameters and optimizer state, no two blocks of memory alike."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    shapes = abstract_state(config, TransMamba(config.model), mesh)
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.random(leaf.shape, np.float32), leaf.dtype)

    return State(jax.tree.map(fill, shapes.params), jax.tree.map(fill, shapes.opt_state))


def save(folder: Path, state: State, config: Config, step: int, checksums: bool) -> tuple[float, float]:
    """Save a step; return the seconds until the caller continues and until all is on disk."""
    os.sync()
    nothing = lambda arrays: lambda: dict.fromkeys(arrays, "")
    start = manifests.start_checksums if checksums else nothing
    writer = checkpoint.Checkpointer(folder, CheckpointConfig(keep_latest=1))
    with mock.patch.object(manifests, "start_checksums", start):
        begin = time.perf_counter()
        writer.save(step, state, {"position": step}, config_io.to_yaml(config), "{}")
        blocked = time.perf_counter() - begin
        writer.wait()
        finished = time.perf_counter() - begin
    writer.close()
    return blocked, finished


def checksum(state: State) -> float:
    """Return the seconds that the checksums take alone."""
    arrays = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(state))}
    begin = time.perf_counter()
    manifests.start_checksums(arrays)()
    return time.perf_counter() - begin


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "paper" / "transmamba-400m.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder where not given")
    args = parser.parse_args()
    config = config_io.load_config(args.config)
    state = make_state(config)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{args.config.name}: {nbytes / 2**30:.2f} GiB. {timing.heading('jax', 'orbax-checkpoint')}", flush=True)
    rows: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for turn in range(args.rounds):
            both: dict[bool, tuple[float, float]] = {}
            for kind in ((True, False), (False, True))[turn % 2]:
                both[kind] = save(Path(folder), state, config, 2 * turn + 1 + len(both), kind)
            rows.append((*both[True], *both[False], checksum(state)))
            print(
                "with checksums {:.2f} s, then {:.2f} s; without {:.2f} s, then {:.2f} s; alone {:.2f} s".format(
                    *rows[-1]
                ),
                flush=True,
            )
    alone = statistics.median(row[4] / row[3] for row in rows)
    more = statistics.median(row[1] / row[3] for row in rows)
    thread = statistics.median(row[0] / row[2] for row in rows)
    print(f"checksums alone over the save {alone:.3f}; save with over without {more:.3f}; training thread {thread:.3f}")
    print(f"peak memory of the process {metrics.peak_memory_bytes() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
