"""Compile the train step for hardware that is not there: `train.py --compile-only --topology v5e:16x16`.

The step, its shardings and kernels are those of a run; the TPU's own compiler (extra `tpu`) runs on any machine.
`cpu:8` compiles for eight simulated devices. Nothing is executed.
"""

import dataclasses
import math
import os
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from transmamba_jax import data, sharding
from transmamba_jax.compile_only.program import Program, read_program
from transmamba_jax.config import Config
from transmamba_jax.model import TransMamba
from transmamba_jax.report.costs import flops_per_token
from transmamba_jax.runtime import hardware
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.training.optimizer import make_optimizer
from transmamba_jax.training.step import abstract_batch, abstract_state, make_train_step

EXIT_DOES_NOT_FIT = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Needs of one step per device."""

    arguments: int
    """Bytes."""
    temporaries: int
    """Bytes."""
    needed: int
    """Bytes that have to be in memory at one time: the TPU compiler's own peak; elsewhere all of them together, since
    the CPU's compiler counts no temporaries in its peak."""
    model_flops: float
    """FLOPs, nothing counted twice."""
    program: Program
    bounds: dict[str, float]
    """Resource -> seconds that a step takes of it at least. Empty where the chip is not known."""
    predicted: float
    """Seconds: cycles and kernels one after another, collectives beside them. NaN where the compiler does not say."""


def compile_only(config: Config, topology: str) -> int:
    """Compile the train step for a topology, print its memory and time, and return the process's exit code.

    0: it compiles and fits. EXIT_DOES_NOT_FIT: it needs more memory than the chip has; what to change is printed.

    Raises:
        ValueError: the topology is unknown or its compiler is not installed, or the configuration cannot run on it.
    """
    begin = time.perf_counter()
    try:
        compiled, mesh = compile_step(config, topology)
    except jax.errors.JaxRuntimeError as error:
        # The TPU's compiler refuses what does not fit. Anything else is a failure of its own.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"does not fit: {str(error).splitlines()[0]}\n{_advice(config)}")
        return EXIT_DOES_NOT_FIT
    seconds = time.perf_counter() - begin
    kind = mesh.devices.flat[0].device_kind
    print(f"{topology}: {mesh.size} x {kind}, mesh {dict(mesh.shape)}, compiled in {seconds:.1f} s")
    return _report(config, compiled, mesh)


def compile_step(config: Config, topology: str) -> tuple[Any, Mesh]:
    """Compile the train step for a topology; return it and the mesh.

    Raises:
        ValueError: the topology is unknown or its compiler is not installed, or the configuration cannot run on it.
        jax.errors.JaxRuntimeError: the compiler failed, with RESOURCE_EXHAUSTED where the step does not fit.
    """
    mesh = sharding.make_mesh(config.mesh, topology_devices(topology))
    sharding.check_divides(config, mesh)
    _check_tokenizer(config)
    model = TransMamba(config.model, config.kernels)
    with jax.set_mesh(mesh):
        state = abstract_state(config, model, mesh)
        train_step = make_train_step(config, model, make_optimizer(config), mesh)
        return train_step.lower(state, abstract_batch(config, mesh)).compile(), mesh


def topology_devices(topology: str) -> list[jax.Device]:
    """Return the devices of `cpu:N`, or of a TPU topology such as `v5e:16x16` that need not exist.

    Raises:
        ValueError: there is no such topology, or its compiler is not installed.
    """
    name, _, size = topology.partition(":")
    if name == "cpu":
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--topology must be cpu:N with N >= 1, found {topology!r}")
        jax.config.update("jax_num_cpu_devices", int(size))
        return jax.devices("cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network whether this is a TPU
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except RuntimeError as error:
        raise ValueError(
            f"--topology {topology!r} cannot be had: {error}. Names are like v5e:16x16, v5p:8x8x8, v6e:16x16 or cpu:8; "
            "the compiler comes with pip install -e '.[tpu]'"
        ) from error


def _check_tokenizer(config: Config) -> None:
    """Refuse a tokenizer that does not fit the model; one that is not made yet is taken to fit."""
    if config.data.tokenizer != "bytes" and not expand_path(config.data.tokenizer).exists():
        print(f"{config.data.tokenizer} is not there: taken to have model.vocab_size={config.model.vocab_size} tokens")
        return
    tokenizer = data.open_tokenizer(config.data)
    data.check_vocabulary(tokenizer, config.model.vocab_size)


def estimate(config: Config, compiled: Any, mesh: Mesh) -> Estimate:
    """Estimate the memory that the compiled step needs per device, and the least time that it takes."""
    device = mesh.devices.flat[0]
    chip = hardware.CHIPS.get(device.device_kind)
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    together = kept + memory.temp_size_in_bytes
    needed = together if chip is None else memory.peak_memory_in_bytes
    tokens = config.data.batch_size * config.data.seq_len
    model_flops = flops_per_token(config.model, config.data.seq_len, config.kernels.chunk_size) * tokens / mesh.size
    program = read_program(compiled.as_text())
    bounds, predicted = {}, math.nan
    if chip is not None:
        bounds = {
            "FLOPs": model_flops / chip.peak_flops,
            # Arguments and results move once, temporaries are written and read.
            "memory": (together + memory.alias_size_in_bytes + memory.temp_size_in_bytes) / chip.bandwidth,
            "links": sum(size for _, size in program.collectives.values()) / chip.links,
        }
        predicted = max(operation_seconds(program, chip), bounds["links"])
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Estimate(arguments, temporaries, needed, model_flops, program, bounds, predicted)


def operation_seconds(program: Program, chip: hardware.Chip) -> float:
    """Predict the seconds of a program's operations one after another: the compiler's cycles, and the kernels."""
    kernels = sum(max(flops / chip.peak_flops, size / chip.bandwidth) for _, flops, size in program.kernels.values())
    return program.cycles * chip.flops_per_cycle / chip.peak_flops + kernels


def _report(config: Config, compiled: Any, mesh: Mesh) -> int:
    """Print the compiler's figures beside our own, per device."""
    found, cost = estimate(config, compiled, mesh), compiled.cost_analysis()
    chip = hardware.CHIPS.get(mesh.devices.flat[0].device_kind)
    gib = lambda count: f"{count / 2**30:.3f} GiB"
    limit = f" of {gib(chip.memory)}" if chip else ""
    parts = f"arguments {gib(found.arguments)}, temporaries {gib(found.temporaries)}"
    print(f"memory of a device   {parts}, {'at the peak' if chip else 'together'} {gib(found.needed)}{limit}")
    print(f"FLOPs of a device    {found.model_flops:.3e} a step, nothing counted twice")
    flops, size, seconds = (cost.get(name, math.nan) for name in ("flops", "bytes accessed", "optimal_seconds"))
    # XLA takes -1 for what it does not know, a kernel say, and adds these up.
    optimal = f"{1e3 * seconds:.2f} ms" if seconds >= 0 else f"no time (its optimal_seconds is {seconds:.2f})"
    print(f"the compiler counts  {flops:.3e} FLOPs, {size:.3e} bytes, {optimal}, a loop's body once")
    for kind, (count, size) in sorted(found.program.collectives.items()):
        print(f"{kind:<20} {count} a step, {size:.3e} bytes of results on a device")
    if not found.program.collectives:
        print("no collectives")
    for name, (count, flops, size) in sorted(found.program.kernels.items()):
        print(f"{name:<20} {count} a step, {flops:.3e} FLOPs, {size:.3e} bytes")
    if not found.bounds or chip is None:
        print(f"no time of a step    there is no data sheet of {mesh.devices.flat[0].device_kind} here")
        return 0
    slowest = max(found.bounds, key=lambda name: found.bounds[name])
    print("bounds on a step     " + ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in found.bounds.items()))
    print(
        f"step                 at least {1e3 * found.bounds[slowest]:.2f} ms ({slowest}); "
        f"utilisation at most {found.bounds['FLOPs'] / found.bounds[slowest]:.2f}"
    )
    print(
        f"predicted            {1e3 * found.predicted:.2f} ms from the compiler's cycles and the kernels; "
        f"utilisation {found.bounds['FLOPs'] / found.predicted:.2f}"
    )
    if found.needed <= chip.memory:
        return 0
    print(f"does not fit: {gib(found.needed)} of {gib(chip.memory)}; {_advice(config)}")
    return EXIT_DOES_NOT_FIT


def _advice(config: Config) -> str:
    options = []
    if config.model.remat != "full":
        options.append(f"train with --model.remat full (now {config.model.remat})")
    options.append(f"raise --train.accumulation (now {config.train.accumulation}) or lower --data.batch-size")
    options.append(
        "give more of the mesh to --mesh.fsdp, to --mesh.context for long rows or --mesh.tensor for wide layers"
    )
    return "; or ".join(options)
