"""The train step: the state, and an update that a NaN cannot reach; the loss is in `loss`."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, no_type_check

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transmamba_jax import sharding
from transmamba_jax.config import Config
from transmamba_jax.data.synthetic import is_synthetic
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import compile_cache, tree_paths
from transmamba_jax.shapes import Array, Float32, Int
from transmamba_jax.training.loss import Batch, Metrics, make_objective, token_weights
from transmamba_jax.training.optimizer import learning_rate_schedule, make_optimizer, updates_made
from transmamba_jax.training.parameter_groups import zero_frozen

Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@no_type_check
@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "step", "key", "skipped_steps", "nonfinite_steps"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that one step hands to the next."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    """Batches consumed, skipped ones included."""
    key: jax.Array
    """The run's random key, the same at every step; a use folds the step in."""
    skipped_steps: Int[Array, ""]
    """Steps of the whole run whose loss or gradient was not finite."""
    nonfinite_steps: Int[Array, ""]
    """Number of the last steps in a row that were skipped."""

    @classmethod
    def create(cls, config: Config, model: nn.Module, mesh: Mesh | None = None) -> "TrainState":
        """Make the initial state, born sharded: no device ever holds an unsharded copy of an array that is split.

        Parameters and moments are float32. `mesh`: None is that of `config.mesh` over all devices.
        """
        mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
        key = jax.random.key(config.train.seed)
        return _initializer(program_config(config), model, mesh, key.dtype)(np.asarray(jax.random.key_data(key)))


_OUTSIDE_PROGRAMS = (
    "seed",
    "init_from",
    "init_partial",
    "given_model",
    "log_every",
    "max_nonfinite_steps",
    "tensorboard",
    "wandb",
    "mlflow",
)
"""Options of `train` that the loop reads and no compiled program does."""


def program_config(config: Config) -> Config:
    """Reset the options that no compiled program depends on: runs that differ in these alone share their programs."""
    default = Config()
    train = {name: getattr(default.train, name) for name in _OUTSIDE_PROGRAMS}
    train["sample_tokens"] = 0  # no rule between sections forbids 0, as one forbids the default to an ablation
    return dataclasses.replace(
        config,
        workdir=default.workdir,
        hosts=default.hosts,
        checkpoint=default.checkpoint,
        eval=default.eval,
        train=dataclasses.replace(config.train, **train),
        data=dataclasses.replace(config.data, seed=default.data.seed, eval_split=default.data.eval_split),
        optimizer=dataclasses.replace(config.optimizer, learning_rate_scale=default.optimizer.learning_rate_scale),
    )


@functools.lru_cache(maxsize=2)
def _initializer(config: Config, model: nn.Module, mesh: Mesh, kind_of_keys: Any) -> jax.stages.Compiled:
    kept = _kept_initializer(config, model, mesh, kind_of_keys)
    if kept is not None:
        return kept

    def lower() -> jax.stages.Lowered:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, mesh))
        initialize = jax.jit(partial(init_state, config, model), out_shardings=shardings)
        return initialize.lower(_abstract_key_data())

    return compile_cache.compile_or_read(lower, *_kept_as("init", config, model, mesh))


@functools.lru_cache(maxsize=2)  # read once, for the shapes of the state and for the state
def _kept_initializer(config: Config, model: nn.Module, mesh: Mesh, _kind_of_keys: Any) -> jax.stages.Compiled | None:
    return compile_cache.read(*_kept_as("init", config, model, mesh))


def _kept_as(
    name: str, config: Config, model: nn.Module, mesh: Mesh
) -> tuple[tuple[Any, ...] | None, list[jax.Device]]:
    """Return the key and the devices of a program; nothing is kept of what is from outside this package."""
    own = type(model) is TransMamba and model.attention is None
    return (name, config, model, mesh.shape) if own else None, mesh.devices.ravel().tolist()


def init_state(config: Config, model: nn.Module, key_data: jax.Array) -> TrainState:
    """Initialise parameters, optimizer and counters; a pure function to trace, see `TrainState.create`.

    Parameters and moments are float32, whatever `model.param_dtype` is: an update of 3e-4 is lost in a bfloat16 1.0,
    whose neighbours are 4e-3 and 8e-3 away.
    """
    init_key, run_key = jax.random.split(jax.random.wrap_key_data(key_data))
    if type(model) is TransMamba:  # a subclass may have parameters that its layers create
        variables = model.init(init_key, method="initialize")
    else:
        variables = model.init(init_key, jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(master_weights, variables["params"])
    zero = lambda: jnp.zeros((), jnp.int32)  # one buffer each: donated buffers must not be shared
    opt_state = make_optimizer(config).init(params)
    return TrainState(params, opt_state, zero(), run_key, zero(), zero())


def master_weights(leaf: jax.Array) -> jax.Array:
    """Widen a parameter to the float32 that training keeps."""
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def abstract_state(config: Config, model: nn.Module, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state without making it."""
    kind = jax.eval_shape(lambda: jax.random.key(0)).dtype  # of jax_default_prng_impl
    return _abstract_state(program_config(config), model, mesh, kind)


@functools.lru_cache(maxsize=2)  # tracing the initialisation takes seconds, and several callers ask
def _abstract_state(config: Config, model: nn.Module, mesh: Mesh, kind_of_keys: Any) -> TrainState:
    kept = _kept_initializer(config, model, mesh, kind_of_keys)
    trace = lambda: jax.eval_shape(partial(init_state, config, model), _abstract_key_data())
    shapes = trace() if kept is None else kept.out_info
    everywhere = NamedSharding(mesh, P())
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        params=sharding.parameter_shardings(shapes.params, mesh),
        opt_state=sharding.like_parameters(shapes.opt_state, shapes.params, mesh),
    )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def _abstract_key_data() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and shardings of a batch without reading one."""
    shape = (config.data.batch_size, config.data.seq_len + 1)
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
    arrays = {name: array(shape, jnp.int32) for name in ("tokens", "bytes")}
    synthetic = is_synthetic(config.data.source)
    if synthetic or config.data.completions_only:
        arrays["weights"] = array(shape, jnp.float32)
    if config.data.packing == "first_fit" and not synthetic:
        arrays["segment_ids"] = array(shape, jnp.int32)
    if config.train.schedule_sampling == "rows":
        arrays["transpoints"] = array((shape[0], config.model.num_layers), jnp.int32)
    return arrays


def make_train_step(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """Return the jitted step (state, batch) -> (state, metrics); the state is donated.

    `mesh`: None is that of `config.mesh` over all devices. `batch` has `tokens` int32 [B, T+1] and, where rows are
    packed, `segment_ids` of the same shape.

    A step whose loss or gradient is not finite leaves parameters and optimizer state as they are and counts itself.
    Metrics are scalars: loss (nats per token; with train.schedule_distillation also teacher_loss and distillation, the
    divergence from the teacher), bits_per_byte where the batch has the `bytes` of its tokens,
    grad_norm (before clipping), param_norm, learning_rate, tokens (that the loss weighs), skipped_steps,
    nonfinite_steps, and nonfinite_leaf: the index in tree order of the first gradient leaf that is not finite (the
    number of leaves: none).

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    step = _step_function(config, model, tx)

    def scaled(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # XLA folds a constant into the sums and rounds otherwise than `compile_train_step`, where this is an argument.
        scale = jax.lax.optimization_barrier(jnp.float32(config.optimizer.learning_rate_scale))
        return step(state, batch, scale)

    return _jit(scaled, config, model, mesh)


_shared: contextvars.ContextVar[dict[Any, jax.stages.Compiled] | None] = contextvars.ContextVar("_shared", default=None)


@contextlib.contextmanager
def share_programs() -> Iterator[None]:
    """Compile a step once for all runs inside that have the same `program_config`, model and mesh.

    For runs of one process that follow one another under the same settings of JAX: a compiled program keeps those of
    its compilation.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def compile_train_step(config: Config, model: nn.Module, mesh: Mesh) -> Step:
    """Compile the step (state, batch) -> (state, metrics), or take it from an earlier run; see `share_programs`.

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    shared = _shared.get()
    programs = {} if shared is None else shared
    key = program_config(config), model, mesh
    if key not in programs:
        programs[key] = _compile(*key)
    program = programs[key]
    scale = jax.device_put(np.float32(config.optimizer.learning_rate_scale), NamedSharding(mesh, P()))
    return lambda state, batch: program(state, batch, scale)


def _compile(config: Config, model: nn.Module, mesh: Mesh) -> jax.stages.Compiled:
    def lower() -> jax.stages.Lowered:
        step = _jit(_step_function(config, model, make_optimizer(config)), config, model, mesh, 1)
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        return step.lower(abstract_state(config, model, mesh), abstract_batch(config, mesh), scale)

    return compile_cache.compile_or_read(lower, *_kept_as("step", config, model, mesh))


def _jit(
    step: Callable[..., Any], config: Config, model: nn.Module, mesh: Mesh, scalars: int = 0
) -> jax.stages.Wrapped:
    """Jit a step of state, batch and some scalars."""
    sharding.check_divides(config, mesh)
    everywhere = NamedSharding(mesh, P())
    states = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, mesh))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(states, sharding.batch_sharding(mesh), *[everywhere] * scalars),
        out_shardings=(states, everywhere),
    )


def _step_function(config: Config, model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Return the step (state, batch, learning_rate_scale) -> (state, metrics)."""
    rate = learning_rate_schedule(program_config(config), config.optimizer.learning_rate)
    objective = make_objective(config, model)
    tx = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: Batch, scale: jax.Array | float) -> tuple[TrainState, Metrics]:
        losses, gradient = objective(state.params, batch)
        loss = losses["loss"]
        gradient = zero_frozen(config, gradient)
        squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradient)])
        grad_norm = jnp.sqrt(jnp.sum(squares))
        good = functools.reduce(jnp.logical_and, map(jnp.isfinite, (*losses.values(), grad_norm)))
        count = updates_made(state.opt_state)  # skipped steps do not move the schedule
        updates, opt_state = tx.update(gradient, state.opt_state, state.params, learning_rate_scale=scale)
        params = _select(good, optax.apply_updates(state.params, updates), state.params)
        new_state = TrainState(
            params=params,
            opt_state=_select(good, opt_state, state.opt_state),
            step=state.step + 1,
            key=state.key,
            skipped_steps=state.skipped_steps + ~good,
            nonfinite_steps=jnp.where(good, 0, state.nonfinite_steps + 1),
        )
        metrics = {
            **losses,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(rate(state.step if count is None else count) * scale, jnp.float32),
            "skipped_steps": new_state.skipped_steps,
            "nonfinite_steps": new_state.nonfinite_steps,
            "nonfinite_leaf": _first_nonfinite_index(squares),
        }
        return new_state, metrics | _token_metrics(loss, batch)

    return train_step


def _token_metrics(loss: Float32[Array, ""], batch: Batch) -> Metrics:
    weights = token_weights(batch)
    tokens = jnp.sum(weights)
    if "bytes" not in batch:
        return {"tokens": tokens}
    bytes_read = jnp.sum(batch["bytes"][:, 1:] * weights)
    return {"tokens": tokens, "bits_per_byte": loss * tokens / (math.log(2) * jnp.maximum(bytes_read, 1.0))}


def leaf_name(tree: Any, index: int) -> str:
    """Name the leaf of a tree by its index in tree order."""
    return tree_paths.path_name(jax.tree.leaves_with_path(tree)[index][0])


def first_nonfinite(tree: Any) -> str | None:
    """Name the first leaf that has a value which is not finite."""
    bad = jax.jit(lambda leaves: jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))(jax.tree.leaves(tree))
    return leaf_name(tree, int(jnp.argmax(bad))) if bool(jnp.any(bad)) else None


def _first_nonfinite_index(squares: Float32[Array, "leaves"]) -> Int[Array, ""]:
    bad = ~jnp.isfinite(squares)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), squares.shape[0]).astype(jnp.int32)


def _select(good: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
