"""Memory that was freed is there for the next step, in a process of its own."""

import json
import os
import statistics
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, json, resource, sys
from transmamba_jax.runtime import host_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would make one fault of 512

arranged = host_memory.keep_freed() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp

# The products keep their operands apart: temporaries of some 64 MB.
step = jax.jit(lambda x: jnp.sum(jnp.sin(x @ x.T) @ x))
x = jnp.ones((4096, 64))
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([arranged, faults]))
"""


PEAK = """
import os, sys
from transmamba_jax.runtime import host_memory

if sys.argv[1] == "start":
    held = b"x" * 600_000_000
    os.execv(sys.executable, [sys.executable, "-c", os.environ["PROGRAM"], "measure"])
before = host_memory.peak_bytes()
held = b"x" * 300_000_000
print(before, host_memory.peak_bytes())
"""


def test_the_peak_is_that_of_the_program_and_not_of_what_started_it() -> None:
    command = [sys.executable, "-c", PEAK, "start"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PROGRAM": PEAK})
    before, after = map(int, result.stdout.split())
    assert before < 300_000_000 <= after < 600_000_000


def run(how: str) -> tuple[bool | None, list[int]]:
    result = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    arranged, faults = json.loads(result.stdout.splitlines()[-1])
    return arranged, faults


@pytest.mark.slow
@pytest.mark.hardware
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    arranged, kept = run("keep")
    _, given_back = run("not")
    assert arranged
    # The first steps may take a block more each: glibc splits what an aligned request leaves over, so that a freed block
    # can be some bytes too short for the same request. Blocks that lie side by side grow together within a dozen steps.
    assert min(given_back[15:]) > 8000  # pages of 4096 bytes, at every step
    assert statistics.median(kept[15:]) < 1000
