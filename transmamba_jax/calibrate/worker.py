"""The process in which candidates run: `python -m transmamba_jax.calibrate.worker`, driven by `trials`.

It reads one request from the standard input and writes one JSON object a line to the standard output. Every line is a
sign of life. An implementation that fails, hangs or dies ends this process and not the one that asked.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import ssd, ssd_state
from transmamba_jax.attention import causal_attention
from transmamba_jax.calibrate.candidates import Job, abstract_inputs, candidates, model_of
from transmamba_jax.calibrate.check import check
from transmamba_jax.runtime import calibration, host_memory
from transmamba_jax.runtime.calibration import Operation, Result

_OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "ssd": ("forward", "forward+backward", "state"),
    "attention": ("forward", "forward+backward"),
}


def say(event: str, **fields: Any) -> None:
    """Write a line for the process that asked."""
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> None:
    """Answer the request on the standard input."""
    request = json.load(sys.stdin)
    host_memory.keep_freed()
    job = Job(**{**request["job"], "lengths": tuple(request["job"]["lengths"])})
    chosen = [Result(**found) for found in request["candidates"]]
    say("ready")
    if request["task"] == "describe":
        _describe(job)
    elif request["task"] == "check":
        _check(job, chosen[0])
    else:
        _time(job, chosen)


def _describe(job: Job) -> None:
    found, passed_over = candidates(job)
    trees = {"candidates": found, "passed_over": passed_over}
    lists = {name: [dataclasses.asdict(each) for each in results] for name, results in trees.items()}
    rows = max(1, job.rows // max(1, jax.device_count() // job.split))
    say("device", key=calibration.key_of(model_of(job)), rows=rows, **lists)


def _check(job: Job, candidate: Result) -> None:
    try:
        check(job, candidate)
    except AssertionError as error:
        say("wrong", message=(str(error).strip().splitlines() or ["an assertion without a message"])[0])
        return
    say("right")


def call_of(job: Job, candidate: Result, operation: Operation, length: int) -> Callable[[], object]:
    """Return a compiled call of a candidate on arrays of its own, which waits for its result."""
    value, key = abstract_inputs(job.model, job.rows, length)
    keys = jax.random.split(jax.random.key(0), 4)
    v, k, q = (
        jax.random.normal(each, struct.shape).astype(struct.dtype)
        for each, struct in zip(keys, (value, key, key), strict=False)
    )
    dt = jax.random.uniform(keys[3], value.shape[:3], jnp.float32, 1e-3, 1e-1)
    a = -jnp.linspace(1.0, 16.0, value.shape[2], dtype=jnp.float32)
    name = candidate.name
    options: dict[str, Any] = {"implementation": name, "chunk_size": candidate.chunk_size or 64}
    run: Callable[..., jax.Array]
    arguments: tuple[jax.Array, ...]
    if candidate.operator == "attention":
        run, arguments = (lambda q, k, v: causal_attention(q, k, v, implementation=name)), (q, k, v)
    elif operation == "state":
        run, arguments = (lambda v, dt, a, k: ssd_state(v, dt, a, k, **options)), (v, dt, a, k)
    else:
        run, arguments = (lambda v, dt, a, k, q: ssd(v, dt, a, k, q, **options)[0]), (v, dt, a, k, q)

    def both(*arguments: Any) -> Any:
        y, pullback = jax.vjp(run, *arguments)
        return pullback(jnp.ones_like(y))

    compiled = jax.jit(both if operation == "forward+backward" else run)
    return lambda: jax.block_until_ready(compiled(*arguments))


def _time(job: Job, chosen: list[Result]) -> None:
    """Time every candidate, in rounds in which they take turns; say who is about to run before each call."""
    for operator, operations in _OPERATIONS.items():
        indices = [index for index, each in enumerate(chosen) if each.operator == operator]
        for length in job.lengths:
            for operation in operations:
                calls = {index: call_of(job, chosen[index], operation, length) for index in indices}
                for index, call in calls.items():
                    say("running", candidate=index)
                    call()
                for turn in range(job.rounds):
                    for index in _from(indices, turn):
                        say("running", candidate=index)
                        start = time.perf_counter()
                        calls[index]()
                        seconds = time.perf_counter() - start
                        say("time", candidate=index, operation=operation, length=length, seconds=seconds)
    say("timed")


def _from(indices: list[int], turn: int) -> list[int]:
    """Return the indices in the order of a round: each begins with the next one."""
    first = turn % len(indices) if indices else 0
    return indices[first:] + indices[:first]


if __name__ == "__main__":
    main()
