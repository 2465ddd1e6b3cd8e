"""Data sheets of the accelerators that the package reckons with, and the name of this machine's processor."""

import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one device by its maker."""

    peak_flops: float
    """FLOP/s, dense, bfloat16."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second, to its memory."""
    links: float
    """Bytes per second, to other devices, all links together and one direction."""
    flops_per_cycle: int
    """FLOPs of its matrix units in one clock cycle, dense, bfloat16."""


# TPU: Google Cloud's pages of the TPU versions; interchip bandwidth is given there in Gbit/s and for both directions.
# GPU: NVIDIA's data sheets of the SXM versions and the whitepapers of Ampere and Hopper: multiprocessors times FLOPs
# per cycle of one; NVLink is given for both directions.
_V5P = Chip(459e12, 95 * 2**30, 2765e9, 4800e9 / 8 / 2, 2**18)
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 2400e9 / 8 / 2, 2**18),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 1600e9 / 8 / 2, 2**17),
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 3584e9 / 8 / 2, 2**19),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 600e9 / 2, 108 * 2048),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 600e9 / 2, 108 * 2048),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 900e9 / 2, 132 * 4096),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 900e9 / 2, 132 * 4096),
}
"""`jax.Device.device_kind` -> its data sheet."""


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Return the bfloat16 FLOP/s of the devices together, or None where a data sheet is missing."""
    if not all(device.device_kind in CHIPS for device in devices):
        return None
    return sum(CHIPS[device.device_kind].peak_flops for device in devices)


def require_devices() -> None:
    """Open JAX's devices before anything else needs them; commands call it where they may.

    Raises:
        ValueError: there are none of the kind that `JAX_PLATFORMS` asks for, or their driver does not start.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 and 0.12 assert where a plug-in finds no device
        asked = os.environ.get("JAX_PLATFORMS")
        found = f": {error}" if str(error) else ""
        hint = "unset JAX_PLATFORMS, or install JAX for these devices (pip install -e '.[cuda12]', '.[tpu]')"
        raise ValueError(f"JAX opens no device with JAX_PLATFORMS={asked}{found}; {hint}") from None


def usable_cores() -> list[int]:
    """Return the numbers of the CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def processor() -> str:
    """Return the name of the CPU, with the number of cores that this process may use."""
    cores = len(usable_cores())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {cores} cores"
    return f"{platform.processor() or platform.machine()}, {cores} cores"
