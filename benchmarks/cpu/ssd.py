"""Race the SSD operator: `python -m benchmarks.cpu.ssd` from the root of the repository prints a table.

Competitors that are not installed are left out: transformers' `mamba2_chunk_scan` (torch) and mamba2-jax's
`ssd_forward`, each at several chunk sizes, of which the fastest counts, shape by shape. All contenders run in one
process and take turns; every one is compared with the float64 recurrence before it is timed. A time is the fastest
call. Peak memory is the growth of the resident set during one call, in a process of its own.

JAX takes a CPU for one device, of which XLA uses every core as far as a program's operations are large. Here every core
is a device as well (of 8 at most, `--devices`), and contenders named "split" have their heads split over them with
`jax.shard_map`, as `mesh.tensor` does, mamba2-jax too; the others run on the first, whose threads are those of all.
A noisy machine wants many rounds (`--rounds 60`): the fastest call of few may have met something else on the machine.
"""

import argparse
import ctypes
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import timing
from benchmarks.ssd_inputs import make_inputs
from pallas_kernels.ssd import oracle, ssd
from transmamba_jax.runtime import host_memory

HEADS, HEAD_DIM = 8, 64
PORTABLE = ("associative", "sequential")
SPLIT = ", split"
PASSES = ("forward", "forward+backward")
TOLERANCE = 1e-5
"""Largest relative L2 error against float64 of a contender that may race (the inputs are benign)."""

Arrays = dict[str, np.ndarray]
Run = Callable[[Any], Any]


class _JaxRun:
    """A jitted function that waits for its result, and can be compiled without being run."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = jax.jit(function)

    def __call__(self, inputs: dict[str, jax.Array]) -> Any:
        return jax.block_until_ready(self._function(inputs))

    def compiled(self, inputs: dict[str, jax.Array]) -> Run:
        executable = self._function.lower(inputs).compile()
        return lambda inputs: jax.block_until_ready(executable(inputs))


def _jax_runs(function: Callable[..., Any]) -> tuple[Run, Run]:
    """Forward, and forward + backward, of function(x, dt, a, b, c, d) -> (y, state)."""
    names = ("x", "dt", "a", "b", "c", "d")

    def forward(inputs: dict[str, jax.Array]) -> Any:
        return function(*(inputs[name] for name in names))

    def both(inputs: dict[str, jax.Array]) -> Any:
        result, pullback = jax.vjp(function, *(inputs[name] for name in names))
        return result, pullback((inputs["dy"], inputs["dstate"]))

    return _JaxRun(forward), _JaxRun(both)


def _ours(implementation: str, chunk: int) -> Callable[..., Any]:
    return functools.partial(ssd, chunk_size=chunk, implementation=implementation)


def _heads(name: str, value: Any) -> NamedSharding:
    """Spread the heads of an argument of `ssd`, or of a cotangent, over all devices."""
    axis = {"a": 0, "d": 0, "dstate": 1}.get(name, 2)
    spec = [None] * np.ndim(value)
    spec[axis] = "heads"
    return NamedSharding(Mesh(np.array(jax.devices()), ("heads",), axis_types=(AxisType.Auto,)), PartitionSpec(*spec))


def _split(function: Callable[..., Any]) -> Callable[..., Any]:
    def split(*arguments: jax.Array) -> Any:
        names = ("x", "dt", "a", "b", "c", "d")
        specs = tuple(_heads(name, value).spec for name, value in zip(names, arguments, strict=True))
        out = (specs[0], PartitionSpec(None, "heads"))
        mesh = _heads("a", arguments[2]).mesh
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

    return split


def _mamba2_jax(chunk: int) -> Callable[..., Any]:
    from mamba2_jax.modeling import ssd_forward

    def function(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        # It applies softplus itself; its inverse is part of the timed call, and small: one scalar a token and head.
        raw = dt + jnp.log(-jnp.expm1(-dt))
        return ssd_forward(x, raw, a, b, c, chunk, d, jnp.zeros_like(a), 0.0, jnp.inf, return_final_states=True)

    return function


def _transformers(chunk: int) -> tuple[Run, Run]:
    import torch
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def call(inputs: Any, needs_grad: bool) -> Any:
        tensors = [inputs[name].requires_grad_(needs_grad) for name in ("x", "dt", "a", "b", "c", "d")]
        x, dt, a, b, c, d = tensors
        return tensors, mamba2_chunk_scan(x, dt, a, b, c, chunk, D=d, return_final_states=True)

    def forward(inputs: Any) -> Any:
        with torch.no_grad():
            return call(inputs, needs_grad=False)[1]

    def both(inputs: Any) -> Any:
        tensors, results = call(inputs, needs_grad=True)
        gradients = torch.autograd.grad(results, tensors, (inputs["dy"], inputs["dstate"]))
        return [result.detach() for result in results], gradients

    return forward, both


def contenders(chunks: tuple[int, ...], peer_chunks: tuple[int, ...]) -> dict[str, tuple[Run, Run]]:
    """Name -> (forward, forward + backward); a peer's name ends in its chunk size."""
    split = jax.device_count() > 1
    found = {f"{name} {chunk}": _jax_runs(_ours(name, chunk)) for name in PORTABLE for chunk in chunks}
    if split:
        found |= {f"sequential{SPLIT} {chunk}": _jax_runs(_split(_ours("sequential", chunk))) for chunk in chunks}
    if peer_chunks and importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        found |= {f"transformers {chunk}": _transformers(chunk) for chunk in peer_chunks}
    if peer_chunks and importlib.util.find_spec("mamba2_jax"):
        found |= {f"mamba2-jax {chunk}": _jax_runs(_mamba2_jax(chunk)) for chunk in peer_chunks}
        if split:
            found |= {f"mamba2-jax{SPLIT} {chunk}": _jax_runs(_split(_mamba2_jax(chunk))) for chunk in peer_chunks}
    return found


def convert(name: str, inputs: Arrays) -> Any:
    """Inputs as the contender takes them."""
    if name.startswith("transformers"):
        import torch

        return {key: torch.from_numpy(value) for key, value in inputs.items()}
    if SPLIT in name:
        return {key: jax.device_put(value, _heads(key, value)) for key, value in inputs.items()}
    return jax.tree.map(jnp.asarray, inputs)


def check(name: str, runs: tuple[Run, Run], state_dim: int) -> float:
    """Return the largest relative error of values and gradients on a short row.

    Raises:
        SystemExit: it is above TOLERANCE: the contender computes something else.
    """
    inputs = make_inputs((1, 300, HEADS, HEAD_DIM, state_dim), seed=7)
    empty = np.zeros((1, HEADS, HEAD_DIM, state_dim))
    truth = oracle.ssd(inputs | {"initial_state": empty}, None, inputs["dy"], inputs["dstate"])
    (y, state), gradients = runs[1](convert(name, inputs))
    values = runs[0](convert(name, inputs))
    names = ("x", "dt", "a", "b", "c", "d")
    pairs = [(y, truth.y), (state, truth.state), (values[0], truth.y), (values[1], truth.state)]
    pairs += [(gradient, truth.gradients[key]) for key, gradient in zip(names, gradients, strict=True)]
    error = max(oracle.relative_error(found, expected) for found, expected in pairs)
    if not error <= TOLERANCE:
        raise SystemExit(f"{name} is off by {error:.1e} against float64")
    return error


def peak_memory(name: str, batch: int, length: int, state_dim: int) -> int:
    """Growth of the resident set in bytes during one forward + backward call, compilation not counted (Linux)."""
    own = int(name.rpartition(" ")[2])
    run = contenders((own,), (own,))[name][1]
    arrays = make_inputs((batch, length, HEADS, HEAD_DIM, state_dim), seed=0)
    inputs = convert(name, arrays)
    if isinstance(run, _JaxRun):
        run = run.compiled(inputs)
    else:
        run(convert(name, make_inputs((1, 64, HEADS, HEAD_DIM, state_dim), seed=0)))  # torch's threads and buffers

    def resident(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"/proc/self/status has no {field}")

    ctypes.CDLL(None).malloc_trim(0)  # freed memory of the compiler would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    run(inputs)
    return resident("VmHWM") - before


def _best(times: dict[str, timing.Timing], family: str) -> tuple[str, timing.Timing]:
    members = [(name, value) for name, value in times.items() if name.rpartition(" ")[0] == family]
    return min(members, key=lambda member: member[1].minimum)


def _turns(run: Run, sets: list[Any]) -> timing.Contender:
    return lambda turn: run(sets[turn % len(sets)])


def race(args: argparse.Namespace, runs: dict[str, tuple[Run, Run]]) -> None:
    """Time every shape and pass, print one line each, then the geometric means of the ratios."""
    families = list(dict.fromkeys(name.rpartition(" ")[0] for name in runs))
    ours = [family for family in families if family.removesuffix(SPLIT) in PORTABLE]
    peers = [family for family in families if family not in ours]
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for index, kind in enumerate(PASSES):
        if kind not in args.passes:
            continue
        print(f"\n{kind}: milliseconds (chunk)")
        print(f"{'B':>2} {'T':>5} {'N':>4}" + "".join(f"{family:>24}" for family in families), flush=True)
        for batch, length, state_dim in itertools.product(args.batch, args.length, args.state):
            sets = [make_inputs((batch, length, HEADS, HEAD_DIM, state_dim), seed) for seed in range(2)]
            inputs = {name: [convert(name, arrays) for arrays in sets] for name in runs}
            turns = {name: _turns(run[index], inputs[name]) for name, run in runs.items()}
            times = timing.round_robin(turns, rounds=args.rounds, seconds=args.seconds)
            best = {family: _best(times, family) for family in families}
            line = f"{batch:>2} {length:>5} {state_dim:>4}"
            for family in families:
                name, value = best[family]
                line += f"{value.minimum * 1e3:>16.2f} ({name.rpartition(' ')[2]:>3})  "
            print(line, flush=True)
            for mine, peer in itertools.product(ours, peers):
                ratio = best[mine][1].minimum / best[peer][1].minimum
                ratios.setdefault((kind, mine, peer), []).append(ratio)
    print("\ngeometric mean of ratios of minima, each side at its best chunk, shape by shape")
    for (kind, mine, peer), values in ratios.items():
        mean = timing.geometric_mean(values)
        print(f"{kind:>18}  {mine} / {peer}: {mean:.3f}  (from {min(values):.3f} to {max(values):.3f})")


def memory(args: argparse.Namespace, runs: dict[str, tuple[Run, Run]]) -> None:
    """Print the peak memory of every contender, each measured in a fresh process."""
    length, state_dim = max(args.length), max(args.state)
    print(f"\npeak memory of forward+backward beyond the inputs, batch 1, T {length}, N {state_dim}")
    for name in runs:
        if SPLIT in name:
            continue
        command = [sys.executable, "-m", "benchmarks.ssd", "--peak-memory-of", name, "--length", str(length)]
        command += ["--state", str(state_dim)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"{name:>18}: {json.loads(output) / 1e9:.3f} GB", flush=True)


def main() -> None:
    """Parse the arguments, print what runs on what, check, race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048, 8192], help="tokens of a row (T)")
    parser.add_argument("--state", type=int, nargs="+", default=[64, 128], help="state size (N)")
    parser.add_argument("--chunk", type=int, nargs="+", default=[128], help="chunk sizes of our implementations")
    parser.add_argument("--peer-chunk", type=int, nargs="+", default=[32, 64, 128, 256], help="chunk sizes of peers")
    parser.add_argument("--only", nargs="+", help="contenders whose names start with one of these")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contender and shape")
    parser.add_argument("--seconds", type=float, default=20.0, help="at most about this long for a shape and pass")
    devices = max(count for count in (1, 2, 4, HEADS) if count <= (os.cpu_count() or 1))
    parser.add_argument("--devices", type=int, default=devices, help="devices that JAX makes of this CPU")
    parser.add_argument("--no-peers", action="store_true", help="our implementations only")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    host_memory.keep_freed()  # for all contenders
    if args.peak_memory_of:
        print(json.dumps(peak_memory(args.peak_memory_of, 1, args.length[0], args.state[0])))
        return
    runs = contenders(tuple(args.chunk), () if args.no_peers else tuple(args.peer_chunk))
    if args.only:
        runs = {name: run for name, run in runs.items() if name.startswith(tuple(args.only))}
    families = {name.rpartition(" ")[0] for name in runs}
    peers = [*(("torch", "transformers") if "transformers" in families else ()), *(families & {"mamba2-jax"})]
    print(timing.heading("jax", *peers))
    print(f"device {jax.devices()[0].device_kind}; float32, H {HEADS}, P {HEAD_DIM}")
    for name, run in runs.items():
        print(f"{name:>18}: largest relative error against float64 {check(name, run, min(args.state)):.1e}", flush=True)
    race(args, runs)
    if not args.no_memory:
        memory(args, runs)


if __name__ == "__main__":
    main()
