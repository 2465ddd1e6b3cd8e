"""Times of one layer and of whole steps on this device, by the code that training and generation run."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.ssd import ssd, ssd_state
from transmamba_jax import sharding
from transmamba_jax.attention import causal_attention
from transmamba_jax.config import Config, KernelsConfig, ModelConfig
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.model import REMAT_POLICIES, Block, TransMamba
from transmamba_jax.schedule import Schedule
from transmamba_jax.training.optimizer import make_optimizer
from transmamba_jax.training.step import TrainState, abstract_batch, make_train_step

Objective = Literal["train", "prefill", "decode"]
Timed = Callable[[], float]
"""Run once and return the seconds."""

Key = TypeVar("Key", bound=Hashable)


def medians(calls: Mapping[Key, Timed], rounds: int) -> dict[Key, float]:
    """Return the median seconds of each call, of rounds in which they take turns, after one that compiles."""
    keys = list(calls)
    for key in keys:
        calls[key]()
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in range(rounds):
        first = turn % len(keys)
        for key in keys[first:] + keys[:first]:
            times[key].append(calls[key]())
    return {key: statistics.median(found) for key, found in times.items()}


def layer_function(model: ModelConfig, kernels: KernelsConfig, point: int) -> tuple[Block, Callable[..., Any]]:
    """Return a layer without its MLP, and its backward pass as training runs it: (params, x, dx) -> gradients."""
    block = Block(dataclasses.replace(model, mlp_dim=0), kernels)
    apply = lambda params, x: block.apply({"params": params}, x, point)
    if model.remat != "none":
        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[model.remat])
    return block, lambda params, x, dx: jax.vjp(apply, params, x)[1](dx)


def residual_dtype(model: ModelConfig) -> str:
    """Return the dtype of the residual stream, a layer's input."""
    return "float32" if model.residual_in_fp32 else model.dtype


def microbatch(config: Config) -> int:
    """Return the rows that go through a layer at one time."""
    return config.data.batch_size // config.train.accumulation


class Stopwatch:
    """Layers and steps of a config that can be run and timed; the mesh is that of the config over all devices."""

    def __init__(self, config: Config, kernels: KernelsConfig, objective: Objective) -> None:
        self.config, self.kernels, self.objective = config, kernels, objective
        self.mesh: Mesh = sharding.make_mesh(config.mesh)

    def layer(self, point: int) -> Timed:
        """Time one layer without its MLP, whose TransPoint is `point`."""
        model = dataclasses.replace(self.config.model, num_layers=1, mlp_dim=0, transpoints=(point,))
        if self.objective != "train":
            return self._decoding(model, (point,))
        block, function = layer_function(model, self.kernels, point)
        shape = (microbatch(self.config), self.config.data.seq_len, model.d_model)
        with jax.set_mesh(self.mesh):
            x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(residual_dtype(model))
            x = jax.device_put(x, sharding.batch_sharding(self.mesh))
            params = block.init(jax.random.key(1), x[:1, :1], 0)["params"]
        compiled = jax.jit(function)

        def run() -> float:
            with jax.set_mesh(self.mesh):
                return self.config.train.accumulation * _seconds(lambda: compiled(params, x, x))

        return run

    def whole(self, points: Schedule) -> Timed:
        """Time a whole step (train), the reading of a row (prefill), or the generation of one (decode)."""
        model = dataclasses.replace(self.config.model, transpoints=points)
        if self.objective != "train":
            return self._decoding(model, points)
        config = dataclasses.replace(self.config, model=model)
        module = TransMamba(model, self.kernels)
        shape = config.data.batch_size, config.data.seq_len + 1
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape)
        with jax.set_mesh(self.mesh):
            batch = {
                name: jnp.ones(each.shape, each.dtype) if name != "tokens" else jnp.asarray(tokens, each.dtype)
                for name, each in abstract_batch(config, self.mesh).items()
            }
            batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
            step = make_train_step(config, module, make_optimizer(config), self.mesh)
        state: list[TrainState] = []

        def run() -> float:
            with jax.set_mesh(self.mesh):
                before = state.pop() if state else TrainState.create(config, module, self.mesh)
                jax.block_until_ready(before)
                start = time.perf_counter()
                after, metrics = step(before, batch)
                jax.block_until_ready((after, metrics))
                seconds = time.perf_counter() - start
            state.append(after)
            return seconds

        return run

    def unrolled(self) -> Timed | None:
        """Time a whole Mamba-2 step without a loop over layers; None where there is no loop: it is the same."""
        layers = self.config.model.num_layers
        if self.objective != "train" or layers == 1 or (self.kernels.unrolled_layers or 1) >= layers:
            return None
        kernels = dataclasses.replace(self.kernels, unrolled_layers=layers)
        return Stopwatch(self.config, kernels, self.objective).whole((0,) * layers)

    def _decoding(self, model: ModelConfig, points: Schedule) -> Timed:
        """Time the decoder: one row of T tokens that is read, or that is generated after a first token."""
        module, length = TransMamba(model, self.kernels), self.config.data.seq_len
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        decoder = Decoder(module, params, points)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, length).tolist()
        if self.objective == "prefill":
            return lambda: _seconds(lambda: decoder.prefill([tokens], total=length).logits)
        first = decoder.prefill([tokens[:1]], total=length)
        return lambda: _seconds(lambda: decoder.decode(first, length - 1, total=length)[1].logits)

    def parts(self, point: int) -> dict[str, Timed]:
        """Time the operators of a layer alone: attention(P), convert(P) and SSD(T - P), those that have tokens.

        Raises:
            ValueError: the objective is decode, in which they run token by token.
        """
        if self.objective == "decode":
            raise ValueError("decode has no operators over rows")
        config, model = self.config, self.config.model
        rows = microbatch(config) if self.objective == "train" else 1
        sizes = {"attention": point, "convert": point % config.data.seq_len, "SSD": config.data.seq_len - point}
        return {name: self._part(name, model, rows, length) for name, length in sizes.items() if length}

    def _part(self, name: str, model: ModelConfig, rows: int, length: int) -> Timed:
        normal = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape).astype(model.dtype)
        v = normal(rows, length, model.num_heads, model.head_dim)
        k = q = normal(rows, length, model.num_groups, model.state_dim)
        # JAX_ENABLE_X64 would make them float64, which SSD does not take.
        dt = jnp.full(v.shape[:3], 0.01, jnp.float32)
        a = -jnp.linspace(1.0, 16.0, model.num_heads, dtype=jnp.float32)
        options: dict[str, Any] = {"chunk_size": self.kernels.chunk_size, "implementation": self.kernels.ssd_choice}
        run: Callable[..., jax.Array] = lambda v, k, q: causal_attention(
            q, k, v, implementation=self.kernels.attention_choice
        )
        if name == "convert":
            run = lambda v, k, _: ssd_state(v, dt, a, k, **options)
        if name == "SSD":
            run = lambda v, k, q: ssd(v, dt, a, k, q, **options)[0]

        def both(v: Any, k: Any, q: Any) -> Any:
            y, pullback = jax.vjp(run, v, k, q)
            return y, pullback(jnp.ones_like(y))

        compiled = jax.jit(both if self.objective == "train" else run)
        times = self.config.train.accumulation if self.objective == "train" else 1
        return lambda: times * _seconds(lambda: compiled(v, k, q))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
