"""Compile the Mosaic GPU kernels for a Hopper that need not be there: `python -m benchmarks.gpu.pallas_compile`.

Prints, for every pair of head and state dimension, registers of a thread, bytes of registers that it spills and bytes
of shared memory of a thread block, forward and backward, of `ssd` or, with `--state`, of `ssd_state`. Exits with 1
where a kernel spills in bfloat16. With `--implementation associative` it shows that XLA compiles the portable form for
a Hopper, and prints the bytes of temporary arrays.

Needs jax >= 0.11.2, its CUDA plugin (the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version suffice) and
CUDA's ptxas and libdevice (the wheels nvidia-cuda-nvcc and nvidia-nvvm; `--cuda` names the folder that holds `bin` and
`nvvm`, by default that of the ptxas on the path). It needs no GPU. What the compiler says is read from the files that
jaxlib writes where MOSAIC_GPU_DUMP_TO points; a version that does not write them is an error here. (It looks for
nvdisasm too, and says so on stderr where that is missing, which does not matter.)
"""

import argparse
import functools
import itertools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

DIMS = (64, 96, 128)
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072 device_address_bits: 64
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""An H100 as XLA describes devices: text of its `GpuTargetConfigProto`."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("pallas_gpu", "associative")
    parser.add_argument("--implementation", choices=choices, default=choices[0], help="default %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shapes", nargs="*", help="PxN; default: all pairs of 64, 96 and 128")
    parser.add_argument("--groups", type=int, default=4, help="groups of the 4 heads; default 4")
    parser.add_argument("--state", action="store_true", help="the kernels of ssd_state")
    ptxas = shutil.which("ptxas")
    found = Path(ptxas).resolve().parents[2] if ptxas else None
    parser.add_argument("--cuda", type=Path, default=found, help="folder with bin/ptxas and nvvm; default %(default)s")
    args = parser.parse_args()
    if args.cuda is None or not (args.cuda / "bin" / "ptxas").is_file():
        parser.error(f"--cuda must name a folder with bin/ptxas, found {args.cuda}")
    return args


def compile_gradient(sharding: Any, mesh: Any, shape: tuple[int, int], args: argparse.Namespace, folder: Path) -> Any:
    """Compile the gradient of a call of these head and state dimensions; reports of kernels go to `folder`."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.ssd import ssd, ssd_state

    (head_dim, state_dim), batch, length, heads = shape, 2, 512, 4
    of = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    low = jnp.dtype(args.dtype)
    inputs = {
        "x": of((batch, length, heads, head_dim), low),
        "dt": of((batch, length, heads), jnp.float32),
        "a": of((heads,), jnp.float32),
        "b": of((batch, length, args.groups, state_dim), low),
        "initial_state": of((batch, heads, head_dim, state_dim), jnp.float32),
    }
    if not args.state:
        inputs |= {"c": inputs["b"], "d": of((heads,), jnp.float32)}

    def loss(inputs: dict[str, jax.Array]) -> jax.Array:
        run = ssd_state if args.state else ssd
        results = jax.tree.leaves(run(**inputs, implementation=args.implementation))
        return sum((jnp.sum(value.astype(jnp.float32)) for value in results), start=jnp.float32(0))

    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",)).compile()


def usage(folder: Path, kernel: str) -> tuple[int, int, int]:
    """Return registers of a thread, bytes spilled and bytes of shared memory of a kernel.

    Raises:
        RuntimeError: the compiler left no report, or one of another form.
    """
    reports = sorted(folder.glob(f"{kernel}_[0-9]*.ptxas")), sorted(folder.glob(f"{kernel}_[0-9]*.resources.txt"))
    if [len(found) for found in reports] != [1, 1]:
        raise RuntimeError(f"expected one .ptxas and one .resources.txt of {kernel}, found {os.listdir(folder)}")
    ptxas, resources = (found[0].read_text() for found in reports)
    patterns = (r"Used (\d+) registers", r"bytes stack frame, (\d+) bytes spill stores")
    matches = [re.findall(pattern, ptxas) for pattern in patterns]
    matches.append(re.findall(r"smem_scratch_bytes=(\d+)", resources))
    if [len(match) for match in matches] != [1, 1, 1]:
        raise RuntimeError(f"the compiler's reports of {kernel} have another form than this reads:\n{ptxas}{resources}")
    registers, spilled, shared = (int(match[0]) for match in matches)
    return registers, spilled, shared


def main() -> None:
    """Parse the arguments, compile, print a line for each variant."""
    args = _arguments()
    # Before jax is imported, which reads them once.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["PATH"] = f"{args.cuda / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={args.cuda}".strip()
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    from benchmarks import timing

    topology = topologies.get_topology_desc(platform="cuda", target_config=HOPPER, topology="1x1x1")
    device = topology.devices[0]
    sharding = SingleDeviceSharding(device)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, num_cores=132, platform="gpu"))
    print(timing.heading("jax", "jaxlib", "jax-cuda13-plugin"))
    name = "ssd_state" if args.state else "ssd"
    print(f"{name} as {args.implementation}, {args.dtype}, {args.groups} groups of 4 heads, {device.device_kind}")
    portable = args.implementation != "pallas_gpu"
    columns = 2 * f" {'registers':>12} {'spilled':>8} {'shared':>8}" + "   forward, backward"
    print(f"{'P':>4} {'N':>4}" + ("  temporary" if portable else columns))
    failed = False
    shapes = [tuple(map(int, text.split("x"))) for text in args.shapes or ()] or itertools.product(DIMS, DIMS)
    for head_dim, state_dim in shapes:
        jax.clear_caches()
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_gradient(sharding, mesh, (head_dim, state_dim), args, Path(folder))
            if portable:
                temporary = compiled.memory_analysis().temp_size_in_bytes
                print(f"{head_dim:>4} {state_dim:>4} {temporary:>10}", flush=True)
                continue
            found = [usage(Path(folder), f"{name}_{direction}") for direction in ("forward", "backward")]
        failed |= args.dtype == "bfloat16" and any(spilled for _, spilled, _ in found)
        columns = "".join(f" {registers:>12} {spilled:>8} {shared:>8}" for registers, spilled, shared in found)
        print(f"{head_dim:>4} {state_dim:>4}{columns}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
