"""Kernels of a run: those that it was started with, else those of this device's calibration record.

Implementations agree to a tolerance, not to the bit. So `kernels.json` in the work directory keeps the choice of the
first start, and a record that is made or changed between two starts on one device changes nothing.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from pallas_kernels import target
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.runtime import calibration, hosts, storage

FILE = "kernels.json"
CPU_LAYERS = 8
"""Layers per iteration of the loop over layers in a training step on a CPU.

The loop writes what the backward pass needs into stacked arrays. Without it a step of 8 layers of width 256 takes 0.87
to 0.94 of the time (docs/kernels.md).
"""


def choose(model: ModelConfig, options: KernelsConfig, workdir: Path) -> KernelsConfig:
    """Return the kernels to run with, the same in every process; log where they differ from those of the first start.

    Names given in `options` win. On another device, or with other options than at the first start, the record of this
    device is looked up again.
    """
    with hosts.collective_errors():
        chosen = _choose(model, options, workdir) if hosts.is_first() else None
    return calibration.from_tree(hosts.broadcast_from_first(chosen))


def for_training(model: ModelConfig, options: KernelsConfig) -> KernelsConfig:
    """Return the kernels of a training step on this device: those given, measured ones, layers per iteration."""
    found = calibration.kernels(model, options, "train")
    if found.unrolled_layers is not None:
        return found
    return dataclasses.replace(found, unrolled_layers=CPU_LAYERS if target.platform() == "cpu" else 1)


def save(kernels: KernelsConfig, workdir: Path) -> None:
    """Keep the choice for the next start of the run."""
    tree = {"device": calibration.device_name(), "kernels": calibration.to_tree(kernels)}
    storage.replace_text(workdir / FILE, json.dumps(tree, indent=1) + "\n", f"{FILE}.new")


def _choose(model: ModelConfig, options: KernelsConfig, workdir: Path) -> dict[str, Any]:
    found = for_training(model, options)
    earlier = _earlier(workdir / FILE)
    if earlier is None:
        return calibration.to_tree(found)
    device, kernels = earlier
    here, before, now = calibration.device_name(), calibration.describe(kernels), calibration.describe(found)
    given = (options.ssd, options.attention, options.chunk_size)
    same = given == (kernels.ssd, kernels.attention, kernels.chunk_size)
    if device == here and same and options.unrolled_layers in (None, kernels.unrolled_layers):
        if before != now:
            hosts.log_first(
                f"kernels stay those that this run was started with: {before}; a start from here on would have {now}; "
                f"delete {workdir / FILE} to have them"
            )
        return calibration.to_tree(kernels)
    named = options.ssd is not None and options.attention is not None
    if before != now or (device != here and not named):
        hosts.log_first(
            f"warning: kernels may change from those that this run was started with: {before} on {device}; now {now} "
            f"on {here}. Results agree to a tolerance, not to the bit; --kernels.ssd and --kernels.attention name them",
            level=logging.WARNING,
        )
    return calibration.to_tree(found)


def _earlier(file: Path) -> tuple[str, KernelsConfig] | None:
    """Return the device and the kernels of the last start; None: there was none, or the file cannot be read."""
    if not file.exists():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return str(tree["device"]), calibration.from_tree(tree["kernels"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        hosts.log_first(f"{file} is not used: {error}", level=logging.WARNING)
        return None
