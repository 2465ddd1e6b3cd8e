"""Times of layers and steps on a chip that is not here, by its compiler's counts: predicted, not measured."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transmamba_jax import sharding
from transmamba_jax.calibrate.stopwatch import Timed, layer_function, microbatch, residual_dtype
from transmamba_jax.compile_only.compiler import compile_step, estimate, operation_seconds, topology_devices
from transmamba_jax.compile_only.program import read_program
from transmamba_jax.config import Config
from transmamba_jax.runtime import hardware
from transmamba_jax.schedule import Schedule


class Topology:
    """Layers and train steps of a config that are compiled for a topology; nothing runs."""

    def __init__(self, config: Config, name: str) -> None:
        """Find the chips.

        Raises:
            ValueError: there is no such topology, its compiler is not installed, or its chip has no data sheet here.
        """
        if name.partition(":")[0] == "cpu":
            raise ValueError(
                f"--topology must be of a chip with a data sheet, found {name!r}: measure a CPU without it"
            )
        devices = topology_devices(name)
        self.config, self.name, self.kind = config, name, devices[0].device_kind
        if self.kind not in hardware.CHIPS:
            raise ValueError(f"--topology must be of a chip with a data sheet, found {name!r}: {self.kind}")
        self.chip = hardware.CHIPS[self.kind]
        self.mesh = sharding.make_mesh(config.mesh, devices)

    def layer(self, point: int) -> Timed:
        """Predict one layer without its MLP, whose TransPoint is `point`."""
        model = dataclasses.replace(self.config.model, num_layers=1, mlp_dim=0, transpoints=(point,))
        block, function = layer_function(model, self.config.kernels, point)
        shape = (microbatch(self.config), self.config.data.seq_len, model.d_model)
        placed = sharding.batch_sharding(self.mesh)
        x = jax.ShapeDtypeStruct(shape, residual_dtype(model), sharding=placed)
        everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

        def compiled() -> float:
            with jax.set_mesh(self.mesh):
                init = lambda: block.init(jax.random.key(1), jnp.zeros((1, 1, model.d_model), x.dtype), 0)["params"]
                params = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), jax.eval_shape(init))
                text = jax.jit(function).lower(params, x, x).compile().as_text()
            assert text is not None
            return self.config.train.accumulation * operation_seconds(read_program(text), self.chip)

        return _once(compiled)

    def unrolled(self) -> None:
        """Compile no second program, which takes minutes: every prediction counts from the step with its loop."""

    def whole(self, points: Schedule) -> Timed:
        """Predict a whole train step."""
        model = dataclasses.replace(self.config.model, transpoints=points)
        config = dataclasses.replace(self.config, model=model)

        def compiled() -> float:
            program, mesh = compile_step(config, self.name)
            return estimate(config, program, mesh).predicted

        return _once(compiled)


def _once(compiled: Callable[[], float]) -> Timed:
    """Compile at the first call alone: the counts are the same every time."""
    found: list[Any] = []

    def run() -> float:
        if not found:
            found.append(compiled())
        return float(found[0])

    return run
