"""Facts about a cell beside its metrics: size, state, FLOPs, where and with which versions it ran."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from transmamba_jax import __version__
from transmamba_jax.config import Config
from transmamba_jax.report.costs import largest_cache_bytes, parameter_count
from transmamba_jax.runtime import hardware
from transmamba_jax.training.metrics import training_flops_per_token


def model_facts(config: Config) -> dict[str, Any]:
    """Return parameters, the largest decoding state of one row in bytes, and FLOPs of the whole training.

    The FLOPs are None where they are not counted, see `training_flops_per_token`.
    """
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    per_token = training_flops_per_token(config)
    return {
        "parameters": parameter_count(config.model),
        "state_bytes": largest_cache_bytes(config.model, config.data.seq_len, config.model.transpoints),
        "training_flops": None if per_token is None else tokens * per_token,
    }


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
