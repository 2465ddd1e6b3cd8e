"""Facts about a cell beside its metrics: size, state, FLOPs, where and with which versions it ran."""

import dataclasses
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from transmamba_jax import __version__
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.model import TransMamba
from transmamba_jax.report.costs import flops_per_token, largest_cache_bytes
from transmamba_jax.runtime import hardware


def model_facts(config: Config) -> dict[str, Any]:
    """Return parameters, the largest decoding state of one row in bytes, and FLOPs of the whole training."""
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    per_token = flops_per_token(config.model, config.data.seq_len, config.kernels.chunk_size)
    return {
        "parameters": _parameters(dataclasses.replace(config.model, transpoints=(0,))),
        "state_bytes": largest_cache_bytes(config.model, config.data.seq_len, config.model.transpoints),
        "training_flops": tokens * per_token,
    }


@functools.cache  # tracing the initialisation takes seconds, and the cells of a study have few models
def _parameters(config: ModelConfig) -> int:
    shapes = jax.eval_shape(TransMamba(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@functools.cache
def environment() -> dict[str, Any]:
    """Return the commit (None outside a git checkout), versions and machine of this process."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "versions": {"transmamba_jax": __version__, "python": platform.python_version(), **versions},
        "machine": f"{jax.device_count()} x {device.device_kind}, {hardware.processor()}",
    }


def _commit() -> str | None:
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        run = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
        return run("rev-parse", "HEAD") + ("-dirty" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
