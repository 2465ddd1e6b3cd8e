"""Predict the step of the paper's models on TPU pods, without one: `python -m benchmarks.tpu.paper_compile`.

Compiles the train steps of configs/paper/ with the TPU's own compiler, one process per row, and appends each finished
row to benchmarks/results/paper_compile.jsonl; rows that are there are not compiled again. Then prints the table:

- memory: what a device needs at one time, of what the chip has. Of ACCUMULATIONS the first that fits is taken.
- predicted: the compiler's estimated cycles of every operation, loops as often as they run, and the instructions of the
  kernels (`kernel_cycles`), one after another; or the collectives at the rate of the links, where those take longer.
- ratio: predicted over the Transformer's on the same chips at the same length.
- at peak, ratio: the same with kernels at the rates of the chip's data sheet, which none reaches.
- utilisation: model FLOPs at the chip's peak over predicted. Bound: over the largest of the times for FLOPs, memory,
  links.

A step is 8,388,608 tokens, as in the paper, or a row for every device where those are more. TransMamba's TransPoints at
32768 tokens are V9's, scaled. Compiling a row takes minutes of CPU time, most of it machine code for matmuls: those of
eight different layers where the schedule has eight TransPoints.

`--one transformer 400m 32768 v5p:8x8x8 1 --options --model.remat dots` compiles one row with other options of train.py,
prints its seconds by instructions and the row, and keeps nothing.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.tpu import compile as tpu_compile
from benchmarks.tpu import kernel_cycles
from transmamba_jax import config_io, schedule
from transmamba_jax.compile_only import compiler
from transmamba_jax.runtime import hardware

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper_compile.jsonl"
MODELS = ("transformer", "mamba2", "transmamba", "hybrid")
SIZES = ("400m", "1b5")
LENGTHS = (8192, 32768)
TOPOLOGIES = {"v5e": "v5e:16x16", "v6e": "v6e:16x16", "v5p": "v5p:8x8x8"}
TOKENS = 1024 * 8192
ACCUMULATIONS = (1, 2, 4)

Row = dict[str, Any]


def overrides(model: str, length: int, topology: str) -> list[str]:
    """Return what differs from the config file: the length, its schedule, and the rows of a step."""
    points = {
        "transformer": schedule.transformer(length),
        "mamba2": schedule.mamba2(),
        "hybrid": schedule.hybrid(length),
        "transmamba": schedule.v9(length),
    }[model]
    rows = max(TOKENS // length, len(compiler.topology_devices(topology)))
    options = ["--data.seq-len", str(length), "--data.batch-size", str(rows)]
    return [*options, "--model.transpoints", *map(str, points)]


def compile_row(
    model: str, size: str, length: int, topology: str, accumulation: int, others: Sequence[str] = ()
) -> Row | None:
    """Compile one step, with other options of train.py where given; None where it does not fit."""
    path = ROOT / "configs" / "paper" / f"{model}-{size}.yaml"
    options = [*overrides(model, length, topology), "--train.accumulation", str(accumulation), *others]
    config = config_io.load_config(path, overrides=options)
    try:
        compiled, mesh = compiler.compile_step(config, topology)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    found = compiler.estimate(config, compiled, mesh)
    memory = hardware.CHIPS[mesh.devices.flat[0].device_kind].memory
    if found.needed > memory:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "model": model,
        "size": size,
        "length": length,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "rows": config.data.batch_size,
        "accumulation": accumulation,
        "remat": config.model.remat,
        "transpoints": config.model.transpoints,
        "needed_bytes": found.needed,
        "memory_bytes": memory,
        "model_flops": found.model_flops,
        "bounds_seconds": found.bounds,
        "predicted_seconds": found.predicted,
        "collectives": found.program.collectives,
        "kernels": found.program.kernels,
        "compile_cpu_seconds": round(used.ru_utime + used.ru_stime),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
    }


def key(row: Row) -> tuple[str, int, str, str]:
    """Name what a row is about."""
    return row["size"], row["length"], row["topology"], row["model"]


def finished() -> dict[tuple[str, int, str, str], Row]:
    """Read the rows that are there."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {key(row): row for row in rows}


def by_instructions(row: Row) -> float:
    """Predict the seconds of a step from what its kernels take by their instructions, not by the data sheet."""
    name = row["topology"].partition(":")[0]
    chip, counted = tpu_compile.CHIPS[name], json.loads(kernel_cycles.RESULTS.read_text())["kernels"][name]
    seconds = row["predicted_seconds"]
    for kernel, (_, flops, size) in row["kernels"].items():
        seconds -= max(flops / chip.peak, size / chip.bandwidth)
        seconds += max(flops / chip.peak / _of_peak(counted, kernel, row["length"]), size / chip.bandwidth)
    return max(seconds, row["bounds_seconds"]["links"])


def _of_peak(counted: dict[str, dict[str, float]], kernel: str, length: int) -> float:
    """Share of the peak that a kernel gets; `ssd_forward_from_1024` takes 1024 tokens as `ssd_state_forward` does."""
    name, _, start = kernel.partition("_from_")
    whole, before = counted[name], int(start or 0)
    alone = counted[name.replace("ssd_", "ssd_state_")] if before else whole
    flops, cycles = (before * alone[what] + (length - before) * whole[what] for what in ("flops", "cycles"))
    return whole["of_peak"] * flops / cycles * whole["cycles"] / whole["flops"]


def table(rows: dict[tuple[str, int, str, str], Row]) -> Iterator[str]:
    """Write the rows as lines."""
    yield (
        f"{'topology':<10} {'model':<16} {'T':>6} {'mesh':<14} {'rows':>9} {'memory GiB':>14} {'predicted':>11} "
        f"{'ratio':>6} {'at peak':>11} {'ratio':>6} {'utilisation':>11} {'bound':>6}"
    )
    for (size, length, topology, model), row in sorted(rows.items()):
        mesh, bounds = row["mesh"], row["bounds_seconds"]
        base = rows.get((size, length, topology, "transformer"))
        memory = f"{row['needed_bytes'] / 2**30:.1f} of {row['memory_bytes'] / 2**30:.0f}"
        name, layout = f"{model}-{size}", f"fsdp {mesh['fsdp']} x {mesh['context']}"
        cut, times = f"{row['rows']} in {row['accumulation']}", []
        for seconds in (by_instructions, lambda row: row["predicted_seconds"]):
            ratio = f"{seconds(row) / seconds(base):>6.2f}" if base else f"{'':>6}"
            times.append(f"{seconds(row):>9.3f} s {ratio}")
        yield (
            f"{topology:<10} {name:<16} {length:>6} {layout:<14} {cut:>9} {memory:>14} "
            f"{' '.join(times)} {bounds['FLOPs'] / by_instructions(row):>11.2f} "
            f"{bounds['FLOPs'] / max(bounds.values()):>6.2f}"
        )


def main() -> None:
    """Compile the rows that are missing, one process each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES)
    parser.add_argument("--lengths", nargs="*", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--chips", nargs="*", choices=TOPOLOGIES, default=tuple(TOPOLOGIES))
    parser.add_argument("--one", nargs=5, metavar=("MODEL", "SIZE", "T", "TOPOLOGY", "ACCUMULATION"), help="one row")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=(), help="of train.py, for --one; the last")
    args = parser.parse_args()
    if args.one:
        model, size, length, topology, accumulation = args.one
        row = compile_row(model, size, int(length), topology, int(accumulation), args.options)
        if row is not None:
            print(f"{by_instructions(row):.3f} s by instructions, {row['predicted_seconds']:.3f} s at the peak")
        print(json.dumps(row))
        return
    names = [
        (size, length, TOPOLOGIES[chip], model)
        for size in args.sizes
        for chip in args.chips
        for length in args.lengths
        for model in args.models
    ]
    for size, length, topology, model in names:
        if (size, length, topology, model) in finished():
            continue
        for accumulation in ACCUMULATIONS:
            one = [model, size, str(length), topology, str(accumulation)]
            command = [sys.executable, "-m", "benchmarks.tpu.paper_compile", "--one", *one]
            result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(result.stdout.splitlines()[-1])
            if row is not None:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                break
        print(f"{' '.join(one)}: {'does not fit' if row is None else 'done'}", flush=True)
    print("\n".join(table(finished())))


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    main()
