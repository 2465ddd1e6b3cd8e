"""Compile every variant of the Triton kernels for GPUs that need not be there: `python -m benchmarks.triton_compile`.

Prints registers, spilled bytes and shared memory, the largest over the head and state dimensions 64, 96 and 128, for
compute capability 8.0 (A100) and 9.0 (Hopper). Exits with 1 where more than 8 bytes spill or a program takes more
shared memory than the smallest GPU of the family has. Needs the `triton` extra, and no GPU.
"""

import argparse
import itertools
import sys
from typing import Any

import jax.numpy as jnp

try:
    from tests.kernels import triton_compiler
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.triton_compile needs the extra `triton` (pip install 'transmamba-jax[triton]'): {error}")

DIMS = (64, 96, 128)
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
SPILLED = 8
"""Bytes of the stack of a thread that a variant may take: one has 8, and no more."""

SHARED_MEMORY = 99 * 1024
"""Bytes a program may have on a GPU of compute capability 8.6 or 8.9; 8.0 has 163 KB, 9.0 has 227 KB."""


def cases(dtype: Any, batch: int, groups: int) -> dict[str, set[triton_compiler.Launch]]:
    """Kernels with their flags -> the launches of all dimensions."""
    found: dict[str, set[triton_compiler.Launch]] = {}
    for head_dim, state_dim in itertools.product(DIMS, DIMS):
        shapes = triton_compiler.shapes(head_dim, state_dim, dtype, groups, batch)
        for function in (triton_compiler.gradient, triton_compiler.state_gradient):
            for launch in triton_compiler.launches(function, shapes):
                found.setdefault(str(launch), set()).add(launch)
    return found


def main() -> None:
    """Parse the arguments, compile, print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="compute capability times ten")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--groups", type=int, default=16, help="groups of the 16 heads")
    parser.add_argument("--batch", type=int, default=2, help="1: the walk of states is cut into segments")
    args = parser.parse_args()
    failed = False
    print(f"{'':>10} {'':>4} {'kernel':<40} {'variants':>8} {'registers':>9} {'spilled':>8} {'shared':>8}")
    for dtype in args.dtype:
        for name, launches in cases(DTYPES[dtype], args.batch, args.groups).items():
            for capability in args.capability:
                usages = [triton_compiler.compile_for(launch, capability) for launch in launches]
                registers = max(usage.registers for usage in usages)
                spilled, shared = max(usage.spilled for usage in usages), max(usage.shared for usage in usages)
                failed |= spilled > SPILLED or shared > SHARED_MEMORY
                line = (
                    f"{dtype:>10} {capability:>4} {name:<40} {len(launches):>8} {registers:>9} {spilled:>8} {shared:>8}"
                )
                print(line, flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
