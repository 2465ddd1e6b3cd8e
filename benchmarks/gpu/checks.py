"""Check one contender of `gpu_suite.py` on the device at hand, in a process of its own.

`python -m benchmarks.gpu.checks NAME DTYPE SHAPE...` prints a line of JSON per result: every check
of the kernel suite of the tests for an implementation of this project, then for any contender the largest relative
error of values and gradients at the head and state dimensions of every shape. A kernel that hangs, or that leaves the
device unusable, takes only this process with it; `check` starts one, and reads what it got to say.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import peers as gpu_peers
from benchmarks.ssd_inputs import make_inputs
from pallas_kernels.ssd import checks, implementations, oracle

ROOT = Path(__file__).resolve().parents[2]
HEADS = 16
"""Of the rows that errors are measured on: the gradients of a and d have a number a head, and few are no average."""

REFUSALS = (ValueError, NotImplementedError)
"""Errors of a call that is not supported here; the second is JAX's own, for a kernel of another platform."""

FAILURES = (AssertionError, RuntimeError, ValueError)
"""Errors of a check: those of a device are RuntimeErrors in JAX and torch."""

Report = dict[str, Any]

# Dimensions that every kernel serves, in place of the suite's small ones.
FIELDS = {"head_dim": 64, "state_dim": 64}
SPECS = (
    checks.Spec(length=1, head_dim=64, state_dim=64),
    checks.Spec(length=130, head_dim=96, state_dim=96, regime="strong"),
    checks.Spec(length=200, heads=2, groups=1, head_dim=128, state_dim=64, chunk_size=128, regime="bursts"),
    checks.Spec(rows=1, length=1100, heads=2, head_dim=64, state_dim=128, chunk_size=128, regime="slow"),
    checks.Spec(rows=6, length=70, head_dim=64, state_dim=96, documents=True, regime="strong", groups=4),
    dataclasses.replace(checks.LONG, head_dim=64, state_dim=64, regime="strong", chunk_size=128),
)


def checks_of(implementation: str) -> dict[str, Callable[[], None]]:
    """Every check of one implementation by name."""
    of = functools.partial
    found = {str(spec): of(checks.check_against_oracle, implementation, spec) for spec in SPECS}
    found |= {f"state alone, {spec}": of(checks.check_state_alone, implementation, spec) for spec in SPECS[1:3]}
    found["defaults"] = of(checks.check_defaults, implementation, FIELDS)
    found["bfloat16"] = of(checks.check_bfloat16, implementation, dataclasses.replace(checks.BFLOAT16, **FIELDS))
    found["padding"] = of(checks.check_padding, implementation, FIELDS)
    found["extreme decays"] = of(checks.check_extreme_decays, implementation, FIELDS)
    return found


def error_of(contender: gpu_peers.Contender, shape: tuple[int, ...], dtype: str) -> float:
    """Largest relative error of values and gradients on a row of 300 tokens."""
    short = (1, 300, HEADS, *shape[3:])
    arrays = make_inputs(short, seed=7)
    rounded = {
        name: np.asarray(jnp.asarray(value, dtype), np.float32) if name in gpu_peers.LOW else value
        for name, value in arrays.items()
    }
    empty = np.zeros((1, HEADS, *shape[3:]))
    truth = oracle.ssd(rounded | {"initial_state": empty}, None, rounded["dy"], rounded["dstate"])
    results, gradients = contender.both(contender.convert(arrays, dtype))
    pairs = list(zip(results, (truth.y, truth.state), strict=True))
    expected = (truth.gradients[name] for name in gpu_peers.NAMES)
    pairs += list(zip(gradients, expected, strict=True))
    return max(oracle.relative_error(gpu_peers.as_numpy(found), wanted) for found, wanted in pairs)


def first_line(error: BaseException) -> str:
    """Name an error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def main() -> None:
    """Check what the command line names."""
    name, dtype, *shapes = sys.argv[1:]
    if name in implementations():
        for index, (check, run) in enumerate(checks_of(name).items()):
            try:
                run()
            except FAILURES as error:
                if index == 0 and isinstance(error, REFUSALS):
                    return _say(refused=first_line(error))
                _say(check=check, failed=first_line(error))
            else:
                _say(check=check)
        contender = gpu_peers.ours(name)
    else:
        contender = gpu_peers.peers()[0][name]
    for shape in shapes:
        try:
            _say(shape=shape, error=error_of(contender, tuple(map(int, shape.split("x"))), dtype))
        except FAILURES as error:
            _say(shape=shape, failed=first_line(error))
    return None


def check(name: str, dtype: str, shapes: list[str], seconds: float) -> Report:
    """Run the checks of a contender in a process of its own, for so long at most.

    Returns:
        {"passed", "failed": {check: why}, "errors": {shape: error}, "unserved": {shape: why}}, and "refused" where the
        first check cannot be served, "stopped" where the process did not end by itself.
    """
    report: Report = {"passed": 0, "failed": {}, "errors": {}, "unserved": {}}
    command = [sys.executable, "-m", "benchmarks.gpu.checks", name, dtype, *shapes]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        output = done.stdout
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            report["stopped"] = f"exit code {done.returncode}: {last}"
    except subprocess.TimeoutExpired as error:
        found = error.stdout or b""
        output = found if isinstance(found, str) else found.decode()
        report["stopped"] = f"not done after {seconds:.0f} s"
    for line in output.splitlines():
        if not line.startswith("{"):
            continue  # what libraries print
        said = json.loads(line)
        if "refused" in said:
            report["refused"] = said["refused"]
        elif "shape" in said:
            report["errors" if "error" in said else "unserved"][said["shape"]] = said.get("error", said.get("failed"))
        elif "failed" in said:
            report["failed"][said["check"]] = said["failed"]
        else:
            report["passed"] += 1
    return report


if __name__ == "__main__":
    main()
