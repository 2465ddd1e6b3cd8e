"""Facts about a cell beside its metrics: size, state, FLOPs, where and with which versions it ran."""

import dataclasses
import functools
import importlib.metadata
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import jax

from transmamba_jax import __version__
from transmamba_jax.config import Config
from transmamba_jax.report.costs import flops_per_token, largest_cache_bytes, parameter_count
from transmamba_jax.runtime import hardware
from transmamba_jax.training import schedule_sampling


def model_facts(config: Config) -> dict[str, Any]:
    """Return parameters, the largest decoding state of one row in bytes, and FLOPs of the whole training.

    The FLOPs of a pool are the mean over its schedules. They are None where a step computes more than one schedule
    (`rows`, distillation) or a layer has more weights (the ablation `separate_weights`).
    """
    length, train = config.data.seq_len, config.train
    tokens = train.steps * config.data.batch_size * length
    drawn = schedule_sampling.pool(config) if train.schedule_sampling == "pool" else []
    random = sum(not schedule_sampling.is_fixed(config, step) for step in range(train.steps)) if drawn else 0
    at = lambda points: flops_per_token(
        dataclasses.replace(config.model, transpoints=points), length, config.kernels.chunk_size
    )
    own = at(config.model.transpoints)
    pool = statistics.fmean(map(at, drawn)) if drawn else own
    per_token = (random * pool + (train.steps - random) * own) / train.steps
    counted = train.schedule_sampling != "rows" and not train.schedule_distillation
    counted = counted and config.model.ablation != "separate_weights"
    return {
        "parameters": parameter_count(config.model),
        "state_bytes": largest_cache_bytes(config.model, config.data.seq_len, config.model.transpoints),
        "training_flops": tokens * per_token if counted else None,
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
