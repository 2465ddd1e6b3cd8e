"""Compile every variant of the Triton kernels for absent GPUs: `python -m benchmarks.gpu.triton_compile`.

Prints registers, spilled bytes and shared memory, the largest over the head and state dimensions 64, 96 and 128, for
compute capability 8.0 (A100) and 9.0 (Hopper), and exits with 1 where a test of the suite would fail: where registers
spill or a program takes more shared memory than the smallest GPU of the family has. Needs the `triton` extra, no GPU.
"""

import argparse
import itertools
import sys

try:
    from tests.kernels import triton_compiler
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.gpu.triton_compile needs the extra `triton` (pip install 'transmamba-jax[triton]'): {error}")


def by_name(dtype: str) -> dict[str, set[triton_compiler.Launch]]:
    """Kernels with their flags -> the variants of all dimensions."""
    found: dict[str, set[triton_compiler.Launch]] = {}
    for head_dim, state_dim in itertools.product(triton_compiler.DIMS, repeat=2):
        for launch in triton_compiler.variants(head_dim, state_dim, dtype):
            found.setdefault(str(launch), set()).add(launch)
    return found


def main() -> None:
    """Parse the arguments, compile, print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    capabilities, dtypes = triton_compiler.CAPABILITIES, triton_compiler.DTYPES
    parser.add_argument("--capability", type=int, nargs="+", default=capabilities, help="compute capability times ten")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    args = parser.parse_args()
    complaints: list[str] = []
    print(f"{'':>10} {'':>4} {'kernel':<30} {'variants':>8} {'registers':>9} {'spilled':>8} {'shared':>8}")
    for dtype in args.dtype:
        for (name, launches), capability in itertools.product(by_name(dtype).items(), args.capability):
            usages = {launch: triton_compiler.compile_for(launch, capability) for launch in launches}
            for launch, usage in usages.items():
                complaints += triton_compiler.complaints(launch, capability, usage)
            registers, spilled, shared = (
                max(getattr(usage, field) for usage in usages.values()) for field in ("registers", "spilled", "shared")
            )
            columns = f"{len(launches):>8} {registers:>9} {spilled:>8} {shared:>8}"
            print(f"{dtype:>10} {capability:>4} {name:<30} {columns}", flush=True)
    sys.exit("\n".join(complaints) or 0)


if __name__ == "__main__":
    main()
