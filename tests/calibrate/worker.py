"""The worker with simulated SSD implementations: one slow, one wrong, one that raises, one that hangs, two that die."""

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import api, sequential
from pallas_kernels.ssd.protocol import SsdInputs
from transmamba_jax.calibrate import worker

LATE = 0.2
"""Seconds that a call of "slow" waits."""


def _late(value: jax.Array) -> jax.Array:
    def sleep(array: Any) -> Any:
        time.sleep(LATE)
        return array

    return jax.pure_callback(sleep, jax.ShapeDtypeStruct(value.shape, value.dtype), value)


@jax.custom_vjp
def wait(value: jax.Array) -> jax.Array:
    """Return the value, late; its gradient is late too, since a gradient alone needs no value."""
    return _late(value)


wait.defvjp(lambda value: (_late(value), None), lambda _, gradient: (_late(gradient),))


def slow(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
    y, state = sequential.forward(inputs, chunk_size, output_start)
    return wait(y), state


def wrong(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
    y, state = sequential.forward(inputs, chunk_size, output_start)
    return y * jnp.asarray(1.001, y.dtype), state


def fails(*_: object) -> tuple[jax.Array, jax.Array]:
    raise ValueError("no such tile\nin this kernel")


def hangs(*_: object) -> tuple[jax.Array, jax.Array]:
    threading.Event().wait()
    raise AssertionError


def exits(*_: object) -> tuple[jax.Array, jax.Array]:
    os._exit(7)


def killed(*_: object) -> tuple[jax.Array, jax.Array]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dies_late(inputs: SsdInputs, chunk_size: int, output_start: int = 0) -> tuple[jax.Array, jax.Array]:
    """Pass the checks, of at most 200 tokens, and die at the longer rows that are timed."""
    return sequential.forward(inputs, chunk_size, output_start) if inputs.x.shape[1] <= 200 else os._exit(9)


SIMULATED = {
    function.__name__: SimpleNamespace(
        forward=function,
        final_state=sequential.final_state,
        unsupported_reason=lambda *_: None,
        partitionable=True,
        supports_output_start=False,
    )
    for function in (slow, wrong, fails, hangs, exits, killed, dies_late)
}


def register(names: list[str]) -> None:
    """Leave the portable implementation of a CPU and add simulated ones."""
    for name in [*api.IMPLEMENTATIONS]:
        if name not in ("sequential", "pallas_tpu"):
            del api.IMPLEMENTATIONS[name]
    for name in names:
        api.IMPLEMENTATIONS[name] = SIMULATED[name]  # type: ignore[assignment]


if __name__ == "__main__":
    import sys

    register(sys.argv[1:])
    worker.main()
