"""Check and race the kernels on the device at hand: `python benchmarks/gpu/suite.py`, or with `-m`, from the root.

First the kernel suite of the tests for every SSD implementation that can serve this device, against the recurrence in
float64, and the error of every contender: each in a process of its own (`checks.py`), the portable forms first.
Then races, forward and forward + backward, in turns in this process: SSD against mamba_ssm's Triton kernels,
flash-linear-attention's simple_gla and jax-linear-attention where they are installed (`peers.py` has the commands),
causal attention against cuDNN. Prints milliseconds, the share of the roofline floor that they reach, ratios, and which
goals are met (`goals.py`); rewrites one JSON file after every part. Needs jax and numpy, and for the race of
attention what this package needs. Exits with 1 where a check fails, nothing of this project can race, or a goal is not
met. It stops before `--minutes` are over and says what it left out.

A time is the fastest round. Work of a round is started `repeats` times and awaited once, so that what starting costs
is hidden behind the device unless it is the longer of the two.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `python benchmarks/gpu/suite.py` finds the packages beside it
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others allocate on the same device
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import timing  # noqa: E402
from benchmarks.gpu import checks as gpu_checks  # noqa: E402
from benchmarks.gpu import goals as gpu_goals  # noqa: E402
from benchmarks.gpu import peers as gpu_peers  # noqa: E402
from benchmarks.gpu.goals import PASSES  # noqa: E402
from benchmarks.ssd_inputs import make_inputs  # noqa: E402
from pallas_kernels.ssd import implementations  # noqa: E402

SHAPES = ("2x8192x16x96x96", "8x8192x16x64x64", "2x8192x16x128x128", "1x32768x16x64x128")
PACKAGES = ("jax", "jaxlib", "numpy", "jax-triton", "triton", "torch", "mamba-ssm", "fla-core", "jax-linear-attention")
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
"""Largest relative L2 error against float64 of a contender that may race."""

FIRST = ("associative", "sequential", "reference")
"""Implementations to check first: the forms that XLA compiles. A kernel that never ran may hang."""

CHECK_SECONDS = 120.0
"""Of one contender at most."""

FAILURES = (ImportError, *gpu_checks.FAILURES, *gpu_peers.errors())

Report = dict[str, Any]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_all(names: list[str], others: list[str], args: argparse.Namespace, deadline: float) -> Report:
    """Check every implementation and every peer, the portable forms first; after the deadline leave out."""
    reports: Report = {}
    for name in [*(n for n in FIRST if n in names), *others, *(n for n in names if n not in FIRST)]:
        seconds = min(CHECK_SECONDS, deadline - time.monotonic())
        if seconds < 1:
            reports[name] = {"refused": "left out: out of time"}
        else:
            reports[name] = gpu_checks.check(name, args.dtype, args.shapes, seconds)
        print(f"{name:>24} {_summary(reports[name])}", flush=True)
    return reports


def _summary(report: Report) -> str:
    if "refused" in report:
        return report["refused"]
    failed = "".join(f"; failed: {check}: {why}" for check, why in report["failed"].items())
    failed += f"; stopped: {report['stopped']}" if "stopped" in report else ""
    errors = ", ".join(f"{error:.1e}" for error in report["errors"].values())
    return f"{report['passed']} checks passed{failed}; errors {errors or 'unknown'}"


def exclusion_reason(report: Report, shape: str, dtype: str) -> str | None:
    """Say why a contender may not race at a shape, from its checks; None: it may."""
    if "refused" in report:
        return report["refused"]
    if shape not in report["errors"]:
        return report["unserved"].get(shape) or f"not checked at these dimensions: {report.get('stopped')}"
    error = report["errors"][shape]
    return None if error <= TOLERANCE[dtype] else f"off by {error:.1e} against float64"


# --- races ------------------------------------------------------------------------------------------------------------


def time_runs(
    runs: dict[str, Callable[[int], Any]], wait: dict[str, Callable[[Any], Any]], args: Any
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds by name, in turns, and why others have none.

    There are as many repeats a round as make the slowest take about 20 ms.
    """
    slowest, failed = 0.0, {}
    for name, run in runs.items():
        try:
            wait[name](run(0))
            begin = time.perf_counter()
            wait[name](run(0))
        except FAILURES as error:
            failed[name] = gpu_checks.first_line(error)
            continue
        slowest = max(slowest, time.perf_counter() - begin)
    if len(failed) == len(runs):
        return {}, failed
    repeats = max(1, min(20, int(0.02 / slowest)))

    def call(name: str, turn: int) -> None:
        for _ in range(repeats):
            results = runs[name](turn)
        wait[name](results)

    calls = {name: functools.partial(call, name) for name in runs if name not in failed}
    times = timing.round_robin(calls, rounds=args.rounds, seconds=args.seconds)
    return {name: value.minimum / repeats * 1e3 for name, value in times.items()}, failed


def _race(operator: str, kind: str, shape: tuple[int, ...], runs: Any, wait: Any, mine: list[str], args: Any) -> Report:
    """Time one pass; a report of the race."""
    times, failed = time_runs(runs, wait, args)
    floor = gpu_goals.floor_seconds(operator, kind, shape, jnp.dtype(args.dtype).itemsize)
    report = {"operator": operator, "pass": kind, "shape": shape, "dtype": args.dtype, "mine": mine}
    report |= {"milliseconds": times, "floor": floor and floor * 1e3, "refused": failed}
    return report | {"ratios": gpu_goals.ratios(report)}


def race_ssd(shape: tuple[int, ...], contenders: dict[str, gpu_peers.Contender], args: Any) -> list[Report]:
    """Time both passes of contenders that were checked."""
    sets = [make_inputs(shape, seed) for seed in range(2)]
    inputs = {name: [c.convert(arrays, args.dtype) for arrays in sets] for name, c in contenders.items()}
    wait = {name: contender.wait for name, contender in contenders.items()}
    reports = []
    for kind in PASSES:
        runs = {
            name: lambda turn, run=(c.forward if kind == "forward" else c.both), own=inputs[name]: run(own[turn % 2])
            for name, c in contenders.items()
        }
        mine = [name for name in contenders if name in implementations()]
        reports.append(_race("ssd", kind, shape, runs, wait, mine, args))
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
        mine = [name for name in found if name.startswith("ours")]
        wait = dict.fromkeys(runs, jax.block_until_ready)
        reports.append(_race("attention", kind, shape, runs, wait, mine, args))
    return reports


# --- what is printed and kept -----------------------------------------------------------------------------------------


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


def _shape(text: str) -> str:
    sizes = text.split("x")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected BxTxHxPxN, five sizes such as {SHAPES[0]}, found {text!r}")
    return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = f"BxTxHxPxN; default {' '.join(SHAPES)}"
    parser.add_argument("--shapes", nargs="*", type=_shape, default=list(SHAPES), help=shapes)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of the races; default bfloat16")
    only = "our implementations to check and race; default all"
    parser.add_argument("--only", nargs="+", choices=implementations(), default=implementations(), help=only)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before this; default 8")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of a race; default 20")
    parser.add_argument("--seconds", type=float, default=5.0, help="at most about this long a race; default 5")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the file")
    return parser.parse_args()


def _stop_hanging(seconds: float) -> None:
    """End the process after so many seconds, whatever a kernel does: the file has all that was finished."""

    def end() -> None:
        print("a race hangs: stopped", flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def race_all(report: Report, found: dict[str, gpu_peers.Contender], args: argparse.Namespace, begin: float) -> None:
    """Race at every shape while there is time; add to the report, show it and write it."""
    # Seconds that a race is expected to take: most of it is compilation, and the search of peers for block sizes.
    longest = {"ssd": 60.0, "attention": 30.0}
    for text in args.shapes:
        shape = tuple(map(int, text.split("x")))
        reasons = {name: exclusion_reason(report["suite"][name], text, args.dtype) for name in found}
        served = {name: contender for name, contender in found.items() if reasons[name] is None}
        races: dict[str, Callable[[], list[Report]]] = {
            "ssd": functools.partial(race_ssd, shape, served, args),
            "attention": functools.partial(race_attention, shape, args),
        }
        for operator, race in races.items():
            started = time.monotonic()
            if started - begin + longest[operator] > 60 * args.minutes:
                report["left_out"].append(f"{operator} {text}: out of time")
                continue
            try:
                results = race()
            except FAILURES as error:
                report["left_out"].append(f"{operator} {text}: {gpu_checks.first_line(error)}")
                continue
            longest[operator] = max(longest[operator], time.monotonic() - started)
            for result in results:
                if operator == "ssd":
                    result["refused"] |= {name: reason for name, reason in reasons.items() if reason is not None}
                report["races"].append(result)
                show(result)
            write(report, args.results)


def main() -> None:
    """Check, race, print and write."""
    args = _arguments()
    begin = time.monotonic()
    _stop_hanging(60 * args.minutes + 60)
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
    others, report["peers_missing"] = gpu_peers.peers()
    for name, reason in report["peers_missing"].items():
        print(f"{name:>24} {reason}")
    report["suite"] = check_all(list(args.only), list(others), args, begin + 30 * args.minutes)
    write(report, args.results)
    # The recurrence takes one step per token: it is the reference.
    mine = [name for name in args.only if report["suite"][name].get("passed") and name != "reference"]
    if mine:
        race_all(report, {name: gpu_peers.ours(name) for name in mine} | others, args, begin)
    else:
        print("nothing of this project serves this device: no race")
    for reason in report["left_out"]:
        print(f"left out: {reason}")
    report["goals"], met = gpu_goals.goals(report["races"])
    print("", *report["goals"], sep="\n")
    report["seconds"] = round(time.monotonic() - begin, 1)
    print(f"\n{report['seconds']:.0f} s; written to {write(report, args.results)}")
    right = not any(found.get("failed") or "stopped" in found for found in report["suite"].values())
    sys.exit(int(not (mine and met and right)))


if __name__ == "__main__":
    main()
