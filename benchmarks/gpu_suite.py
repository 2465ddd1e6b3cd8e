"""Check and race the kernels on the device at hand: `python benchmarks/gpu_suite.py`, or with `-m`, from the root.

First the kernel suite of the tests for every SSD implementation that can serve this device, against the recurrence in
float64. Then races, forward and forward + backward, all in one process and in turns: SSD against mamba_ssm's Triton
kernels, flash-linear-attention's simple_gla and jax-linear-attention where they are installed, causal attention against
cuDNN. Prints milliseconds, the share of the roofline floor that they reach, and ratios; writes one JSON file. Needs jax
and numpy, and for the race of attention what this package needs. Exits with 1 where a check fails. It stops before
`--minutes` are over and says what it left out.

A time is the fastest round. Work of a round is started `repeats` times and awaited once, so that what starting costs
is hidden behind the device unless it is the longer of the two.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python benchmarks/gpu_suite.py` finds the packages beside it
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers allocate on the same device
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import gpu_peers, timing  # noqa: E402
from benchmarks.ssd_inputs import make_inputs  # noqa: E402
from pallas_kernels.ssd import implementations  # noqa: E402
from tests.kernels import checks, oracle  # noqa: E402

SHAPES = ("2x8192x16x96x96", "8x8192x16x64x64", "2x8192x16x128x128", "1x32768x16x64x128")
PASSES = ("forward", "forward+backward")
PACKAGES = ("jax", "jaxlib", "numpy", "jax-triton", "triton", "torch", "mamba-ssm", "fla-core", "jax-linear-attention")
RATES = {"H100": (798e12, 3.0e12), "H200": (788e12, 4.3e12), "A100": (312e12, 2.0e12)}
"""bfloat16 FLOP/s and bytes/s: H100 and H200 as measured on such machines, A100 from its data sheet."""

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
"""Largest relative L2 error against float64 of a contender that may race."""

REFUSALS = (ValueError, NotImplementedError)
"""How a call says that it cannot be served here; the second is JAX's own, for a kernel of another platform."""

FAILURES = (AssertionError, jax.errors.JaxRuntimeError, *REFUSALS)

Report = dict[str, Any]


# --- the suite --------------------------------------------------------------------------------------------------------

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


def check_implementations(names: list[str], deadline: float) -> Report:
    """Run the suite for each, {"refused": why} where the first check cannot be served; after the deadline leave out."""
    pending = {name: checks_of(name) for name in names}
    reports: Report = {name: {"passed": 0, "failed": {}, "left_out": []} for name in names}

    def run(name: str, check: str) -> None:
        try:
            pending[name].pop(check)()
        except REFUSALS as error:
            if reports[name]["passed"] or reports[name]["failed"]:
                reports[name]["failed"][check] = _first_line(error)
            else:
                reports[name] = {"refused": _first_line(error)}
                pending[name] = {}
        except FAILURES as error:
            reports[name]["failed"][check] = _first_line(error)
        else:
            reports[name]["passed"] += 1

    for name in names:
        run(name, next(iter(pending[name])))
    for name in reversed(names):  # the hardware's own kernels stand last in the table
        for check in list(pending[name]):
            if time.monotonic() < deadline:
                run(name, check)
        if pending[name]:
            reports[name]["left_out"] = list(pending[name])
        print(f"{name:>24} {_summary(reports[name])}", flush=True)
    return reports


def _summary(report: Report) -> str:
    if "refused" in report:
        return report["refused"]
    failed = "".join(f"; failed: {check}: {why}" for check, why in report["failed"].items())
    return f"{report['passed']} checks passed, {len(report['left_out'])} left out{failed}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# --- races ------------------------------------------------------------------------------------------------------------


def error_of(contender: gpu_peers.Contender, shape: tuple[int, ...], dtype: str) -> float:
    """Largest relative error of values and gradients on a row of 300 tokens."""
    short = (1, 300, 2, *shape[3:])
    arrays = make_inputs(short, seed=7)
    rounded = {
        name: np.asarray(jnp.asarray(value, dtype), np.float32) if name in gpu_peers.LOW else value
        for name, value in arrays.items()
    }
    empty = np.zeros((1, 2, *shape[3:]))
    truth = oracle.ssd(rounded | {"initial_state": empty}, None, rounded["dy"], rounded["dstate"])
    results, gradients = contender.both(contender.convert(arrays, dtype))
    pairs = list(zip(results, (truth.y, truth.state), strict=True))
    expected = (truth.gradients[name] for name in gpu_peers.NAMES)
    pairs += list(zip(gradients, expected, strict=True))
    return max(oracle.relative_error(gpu_peers.as_numpy(found), wanted) for found, wanted in pairs)


def floor_seconds(kind: str, shape: tuple[int, ...], itemsize: int) -> float | None:
    """Time that traffic or products of a fused kernel with chunks of 64 take at least; None: unknown device."""
    rates = next((rates for name, rates in RATES.items() if name in jax.devices()[0].device_kind), None)
    if rates is None or itemsize != 2:
        return None
    batch, length, heads, p, n = shape
    flops, moved = 2 * 64 * (n + p) + 4 * n * p, itemsize * (2 * p + 2 * n) + 4
    total = max(flops / rates[0], moved / rates[1])
    if kind != "forward":
        flops, moved = 2 * 64 * (3 * n + 2 * p) + 10 * n * p, itemsize * (3 * p + 4 * n) + 8
        total += max(flops / rates[0], moved / rates[1])
    return batch * length * heads * total


def time_runs(runs: dict[str, Callable[[int], Any]], wait: dict[str, Callable[[Any], Any]], args: Any) -> Report:
    """Milliseconds by name, in turns; as many repeats a round as make the slowest take about 20 ms."""
    slowest = 0.0
    for name, run in runs.items():
        wait[name](run(0))
        begin = time.perf_counter()
        wait[name](run(0))
        slowest = max(slowest, time.perf_counter() - begin)
    repeats = max(1, min(20, int(0.02 / slowest)))

    def call(name: str, turn: int) -> None:
        for _ in range(repeats):
            results = runs[name](turn)
        wait[name](results)

    calls = {name: functools.partial(call, name) for name in runs}
    times = timing.round_robin(calls, rounds=args.rounds, seconds=args.seconds)
    return {name: value.minimum / repeats * 1e3 for name, value in times.items()}


def race_ssd(shape: tuple[int, ...], contenders: dict[str, gpu_peers.Contender], args: Any) -> list[Report]:
    """Check every contender at these dimensions, then time both passes."""
    served: dict[str, gpu_peers.Contender] = {}
    report: Report = {"operator": "ssd", "shape": shape, "dtype": args.dtype, "errors": {}, "refused": {}}
    for name, contender in contenders.items():
        try:
            error = error_of(contender, shape, args.dtype)
        except FAILURES as reason:
            report["refused"][name] = _first_line(reason)
            continue
        report["errors"][name] = error
        if error <= TOLERANCE[args.dtype]:
            served[name] = contender
        else:
            report["refused"][name] = f"off by {error:.1e} against float64"
    sets = [make_inputs(shape, seed) for seed in range(2)]
    inputs = {name: [contender.convert(arrays, args.dtype) for arrays in sets] for name, contender in served.items()}
    reports = []
    for kind in PASSES:
        runs = {
            name: lambda turn, run=(c.forward if kind == "forward" else c.both), own=inputs[name]: run(own[turn % 2])
            for name, c in served.items()
        }
        found = time_runs(runs, {name: contender.wait for name, contender in served.items()}, args)
        floor = floor_seconds(kind, shape, jnp.dtype(args.dtype).itemsize)
        reports.append(report | {"pass": kind, "milliseconds": found, "floor": floor and floor * 1e3})
    return reports


def _attention_contenders() -> dict[str, Callable[..., jax.Array]]:
    from transmamba_jax.attention import causal_attention

    library = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return {
        "ours, automatic": causal_attention,
        "ours, blockwise": functools.partial(causal_attention, implementation="blockwise"),
        f"peer {library}": functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=library),
    }


def race_attention(shape: tuple[int, ...], args: Any) -> list[Report]:
    """Race causal attention at the batch, length, heads and state dim of `shape`."""
    batch, length, heads, _, width = shape
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((batch, length, heads, width), np.float32), args.dtype) for _ in range(4)
    )
    found = _attention_contenders()

    def both(attend: Callable[..., jax.Array], *inputs: jax.Array) -> Any:
        y, back = jax.vjp(attend, *inputs[:3])
        return y, *back(inputs[3])

    def contender(attend: Callable[..., jax.Array], kind: str) -> Callable[[int], Any]:
        run = jax.jit(attend if kind == "forward" else functools.partial(both, attend))
        inputs = (q, k, v) if kind == "forward" else (q, k, v, g)
        return lambda _: run(*inputs)

    reports = []
    for kind in PASSES:
        runs = {name: contender(attend, kind) for name, attend in found.items()}
        times = time_runs(runs, dict.fromkeys(runs, jax.block_until_ready), args)
        shared = {"operator": "attention", "shape": shape, "dtype": args.dtype, "pass": kind}
        reports.append(shared | {"milliseconds": times, "floor": None, "refused": {}})
    return reports


# --- what is printed and kept -----------------------------------------------------------------------------------------


def ratios(report: Report, mine: list[str]) -> dict[str, float]:
    """Our fastest over each other's time, of one race."""
    times = report["milliseconds"]
    own = [times[name] for name in mine if name in times]
    return {name: min(own) / value for name, value in times.items() if name not in mine} if own else {}


def show(report: Report) -> None:
    """Print one race."""
    shape = "x".join(map(str, report["shape"]))
    print(f"\n{report['operator']} {report['pass']} {shape} {report['dtype']}")
    for name, milliseconds in sorted(report["milliseconds"].items(), key=lambda item: item[1]):
        share = "" if report["floor"] is None else f"{report['floor'] / milliseconds:>8.0%} of the floor's rate"
        ratio = report["ratios"].get(name)
        print(f"{name:>24} {milliseconds:>10.3f} ms {share}" + ("" if ratio is None else f"   ours / it {ratio:.2f}"))
    for name, reason in report["refused"].items():
        print(f"{name:>24} {reason}", flush=True)


def _versions() -> dict[str, str]:
    found = {distribution.metadata["Name"].lower(): distribution.version for distribution in
             importlib.metadata.distributions()}  # fmt: skip
    return {name: found[name] for name in PACKAGES if name in found}


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(report: Report, folder: Path) -> Path:
    """Write the JSON file, named by day and device."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "".join(c if c.isalnum() else "-" for c in report["device"]).strip("-").lower()
    path = folder / f"gpu-suite-{report['date'][:10]}-{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help=f"BxTxHxPxN; default {' '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of the races; default bfloat16")
    parser.add_argument("--only", nargs="+", help="our implementations to check and race; default all")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before this; default 8")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of a race; default 20")
    parser.add_argument("--seconds", type=float, default=5.0, help="at most about this long a race; default 5")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the file")
    return parser.parse_args()


def main() -> None:
    """Check, race, print and write."""
    args = _arguments()
    begin = time.monotonic()
    device = jax.devices()[0]
    print(timing.heading("jax", "jaxlib"))
    print(f"device {device.device_kind}, {device.client.platform_version}")
    report: Report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device.device_kind,
        "versions": {"python": sys.version.split()[0]} | _versions(),
        "races": [],
        "left_out": [],
    }
    names = [name for name in implementations() if not args.only or name in args.only]
    report["suite"] = check_implementations(names, begin + 30 * args.minutes)
    # The recurrence itself takes a step a token: it is there to be compared with.
    mine = [name for name in names if report["suite"][name].get("passed") and name != "reference"]
    others, report["peers_missing"] = gpu_peers.peers()
    for name, reason in report["peers_missing"].items():
        print(f"{name:>24} {reason}")
    contenders = {name: gpu_peers.ours(name) for name in mine} | others
    # Seconds that a race is expected to take: most of it is compilation, and the search of peers for block sizes.
    longest = {"ssd": 60.0, "attention": 30.0}
    for text in args.shapes:
        shape = tuple(map(int, text.split("x")))
        races: dict[str, Callable[[], list[Report]]] = {
            "ssd": functools.partial(race_ssd, shape, contenders, args),
            "attention": functools.partial(race_attention, shape, args),
        }
        for operator, race in races.items():
            started = time.monotonic()
            if started - begin + longest[operator] > 60 * args.minutes:
                report["left_out"].append(f"{operator} {text}: out of time")
                continue
            try:
                found_races = race()
            except (ImportError, *FAILURES) as error:
                report["left_out"].append(f"{operator} {text}: {_first_line(error)}")
                continue
            longest[operator] = max(longest[operator], time.monotonic() - started)
            for result in found_races:
                own = mine if operator == "ssd" else [n for n in result["milliseconds"] if n.startswith("ours")]
                result["ratios"] = ratios(result, own)
                report["races"].append(result)
                show(result)
    for reason in report["left_out"]:
        print(f"left out: {reason}")
    report["seconds"] = round(time.monotonic() - begin, 1)
    print(f"\n{report['seconds']:.0f} s; written to {write(report, args.results)}")
    sys.exit(int(any(found.get("failed") for found in report["suite"].values())))


if __name__ == "__main__":
    main()
