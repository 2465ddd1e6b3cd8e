"""Instructions of the Pallas kernels on TPUs, without one: `python -m benchmarks.tpu.kernel_cycles`.

A compiled program has an estimate of cycles for every operation but its kernels. Those are counted here in the
compiler's final schedules: a core starts one VLIW instruction a cycle, if it waits for nothing. Prints, and keeps in
benchmarks/results/kernel_cycles.json, the cycles of each kernel of the paper's models (16 heads, N = P = 96, bfloat16,
two rows of 8192 tokens) and their share of the matrix units' peak, FLOPs counted once and unpadded. `paper_compile`
takes the kernels' time from there.

- ssd, causal_conv: all instructions of a kernel, as often as there are chunks (strips); those outside the loop over the
  chunks of a grid cell are counted too often. The convolution's are for 16 x 96 channels.
- splash: those between the first and the last matmul of a cell, as often as a block of pairs is not masked away; what
  surrounds them and cells without work are not counted. So SSM layers are made slower, attention faster than they are.
  "With every cell" adds those before the first matmul, which cells without work run too: few large blocks need fewer.

With `--splash-block 512` it prints, and keeps nothing, for blocks of attention of another edge.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import timing
from benchmarks.tpu import compile as tpu_compile
from pallas_kernels.causal_conv1d.pallas_tpu import causal_conv1d
from pallas_kernels.ssd import ssd, ssd_state
from transmamba_jax.attention import causal_attention, library
from transmamba_jax.compile_only.program import read_program
from transmamba_jax.runtime import hardware

RESULTS = Path(__file__).parents[1] / "results" / "kernel_cycles.json"
ROWS, LENGTH, HEADS, WIDTH = 2, 8192, 16, 96


def gradients(x: Any, dt: Any, a: Any, k: Any, q: Any) -> Any:
    """Run the forward and backward pass of every kernel: attention, SSM, the state alone, the convolution."""

    def forward(x: Any, dt: Any, k: Any, q: Any) -> Any:
        channels = HEADS * WIDTH
        taps = jnp.ones((4, channels), jnp.float32)
        convolved = causal_conv1d(x.reshape(*x.shape[:2], channels), taps, taps[0], silu=True)
        attended = causal_attention(q, k, x, implementation="splash")
        scanned, _ = ssd(x, dt, a, k, q, implementation="pallas_tpu")
        return attended, scanned, ssd_state(x, dt, a, k, implementation="pallas_tpu"), convolved

    results, backward = jax.vjp(forward, x, dt, k, q)
    return backward(results)


def count(chip: str, folder: Path) -> dict[str, dict[str, float]]:
    """Compile for a chip and count: kernel -> cycles, FLOPs and what they are of the peak. LIBTPU_INIT_ARGS dumps."""
    device = tpu_compile.CHIPS[chip].device
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    wide, narrow = (ROWS, LENGTH, HEADS, WIDTH), (ROWS, LENGTH, HEADS)
    half, full = jnp.bfloat16, jnp.float32
    operands = array(wide, half), array(narrow, full), array((HEADS,), full), array(wide, half), array(wide, half)
    text = jax.jit(gradients).lower(*operands).compile().as_text()
    found = {}
    for name, (_, flops, _) in sorted(read_program(text).kernels.items()):
        (schedule,) = folder.glob(f"*-{name}.*-final_hlo-static-per-bundle-utilization.txt")
        (program,) = folder.glob(f"*-{name}.*-post-delay-converter.txt")
        block = int(re.search(r"block_q\W+(\d+)", text)[1])  # type: ignore[index]
        cycles, every = _cycles(schedule, program, LENGTH // block if name.startswith("splash") else None)
        share = flops / cycles / hardware.CHIPS[device.device_kind].flops_per_cycle
        short = re.sub(r"^(transpose_)?(jvp_)?|_+$", "", name)
        found[short] = {"cycles": cycles, "with_every_cell": every, "flops": flops, "of_peak": share}
    return found


def _cycles(schedule: Path, program: Path, blocks: int | None) -> tuple[float, float]:
    """Count from the slots that every instruction uses, the matrix units' first, and from the program's loops."""
    _, _, lines = schedule.read_text().partition("== UTILIZATION:\n")
    matmuls = [int(line.split()[0]) > 0 for line in lines.splitlines()]
    grid, *inner = map(int, re.findall(r"loop: start=0, step=1, limit=(\d+)", program.read_text()))
    cells = grid - 2  # of one core; two more turns fill and drain the pipeline
    if blocks is None:
        return (len(matmuls) * cells * max(inner, default=1),) * 2
    before = matmuls.index(True)
    least = (len(matmuls) - matmuls[::-1].index(True) - before) * cells * (blocks + 1) / 2 / blocks
    return least, least + before * cells


def main() -> None:
    """Count, one process a chip, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "FOLDER"), help="one chip, dumped into a folder")
    parser.add_argument("--splash-block", type=int, default=library._SPLASH_BLOCK, help="edge, tokens")
    args = parser.parse_args()
    chosen, library._SPLASH_BLOCK = library._SPLASH_BLOCK, args.splash_block
    if args.one:
        print(json.dumps(count(args.one[0], Path(args.one[1]))))
        return
    kept: dict[str, Any] = {"heading": timing.heading("jax", "libtpu"), "kernels": {}}
    for chip in tpu_compile.CHIPS:
        with tempfile.TemporaryDirectory() as folder:
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            command = [sys.executable, "-m", "benchmarks.tpu.kernel_cycles", "--one", chip, folder]
            command += ["--splash-block", str(args.splash_block)]
            environment = {**os.environ, "LIBTPU_INIT_ARGS": dump}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = kept["kernels"][chip] = json.loads(result.stdout.splitlines()[-1])
        for name, row in found.items():
            least, every = (row[count] / ROWS / LENGTH / HEADS for count in ("cycles", "with_every_cell"))
            each = f"{least:>5.1f} cycles per token and head, {every:>5.1f} with every cell"
            print(f"{chip} {name:<28} {each}, {row['of_peak']:.2f} of the peak", flush=True)
    if args.splash_block == chosen:
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    main()
