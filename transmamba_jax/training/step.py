"""The train step: loss over token chunks, gradients over microbatches, and an update that a NaN cannot reach.

    loss = sum_i w_i · (logsumexp(z_i) - z_i[target_i]) / sum_i w_i      z = logits in float32, nats per token

The weight of a token is that of the batch or 1, and 0 where its target belongs to another document or is padding.
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transmamba_jax import sharding
from transmamba_jax.config import Config
from transmamba_jax.data.synthetic import is_synthetic
from transmamba_jax.runtime import tree_paths
from transmamba_jax.runtime.token_loss import chunked_cross_entropy
from transmamba_jax.shapes import Array, Float32, Int
from transmamba_jax.training.optimizer import learning_rate_schedule, make_optimizer
from transmamba_jax.training.parameter_groups import zero_frozen

Batch = dict[str, jax.Array]
"""`tokens` int32 [B, T+1]; `segment_ids` of that shape where rows are packed; `weights` float32 of that shape where
tokens are not all to be learned, such as the answers of a task or completions; `transpoints` int32 [B, L] where rows
draw them."""
Metrics = dict[str, jax.Array]


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
        """Make the initial state, born sharded: no device ever holds a whole copy of an array that is split.

        Parameters and moments are float32. `mesh`: None is that of `config.mesh` over all devices.
        """
        mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, mesh))
        return jax.jit(partial(init_state, config, model), out_shardings=shardings)()


def init_state(config: Config, model: nn.Module) -> TrainState:
    """Initialise parameters, optimizer and counters; a pure function to trace, see `TrainState.create`.

    Parameters and moments are float32, whatever `model.param_dtype` is: an update of 3e-4 is lost in a bfloat16 1.0,
    whose neighbours are 4e-3 and 8e-3 away.
    """
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    params = jax.tree.map(master_weights, model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"])
    zero = lambda: jnp.zeros((), jnp.int32)  # one buffer each: donated buffers must not be shared
    opt_state = make_optimizer(config).init(params)
    return TrainState(params, opt_state, zero(), run_key, zero(), zero())


def master_weights(leaf: jax.Array) -> jax.Array:
    """Widen a parameter to the float32 that training keeps."""
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@functools.lru_cache(maxsize=2)  # tracing the initialisation takes seconds, and several callers ask
def abstract_state(config: Config, model: nn.Module, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state without making it."""
    shapes = jax.eval_shape(partial(init_state, config, model))
    everywhere = NamedSharding(mesh, P())
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        params=sharding.parameter_shardings(shapes.params, mesh),
        opt_state=sharding.like_parameters(shapes.opt_state, shapes.params, mesh),
    )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


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


def token_weights(batch: Batch) -> Float32[Array, "B T"]:
    """Weigh the targets of a batch: its own weights or 1, and 0 for padding and the first token of a document."""
    given = batch["weights"][:, 1:] if "weights" in batch else None
    weights = jnp.ones(batch["tokens"][:, 1:].shape, jnp.float32) if given is None else given
    if "segment_ids" not in batch:
        return weights
    ids = batch["segment_ids"]
    return jnp.where((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0), weights, 0)


def _loss_and_gradient(
    params: Any, model: nn.Module, batch: Batch, weights: Float32[Array, "B T"], chunk: int
) -> tuple[Float32[Array, ""], Any]:
    """Return the weighted sum of the cross-entropies of a batch in nats, and its gradient."""
    inputs: Batch = {name: batch[name][:, :-1] for name in ("tokens", "segment_ids") if name in batch}
    if "transpoints" in batch:
        inputs["transpoints"] = batch["transpoints"].T
    run = partial(model.apply, **inputs, method="hidden")
    hidden, pullback = jax.vjp(lambda params: run({"params": params}), params)
    name = "lm_head" if "lm_head" in params else "embedding"
    logits = lambda head, part: model.apply({"params": {**params, name: head}}, part, method="logits")
    loss, (dhead, dhidden) = chunked_cross_entropy(logits, params[name], hidden, batch["tokens"][:, 1:], weights, chunk)
    (gradient,) = pullback(dhidden)
    return loss, {**gradient, name: gradient[name] + dhead}


def loss_and_gradient(
    params: Any, model: nn.Module, batch: Batch, accumulation: int, chunk: int
) -> tuple[Float32[Array, ""], Any]:
    """Return the mean loss over the whole batch and its gradient, from `accumulation` microbatches one after another.

    Each microbatch's weights are divided by the token count of the *batch*, so the sums add up to the batch's own mean
    and gradient however unevenly the tokens are spread.
    """
    total = jnp.sum(token_weights(batch))
    total = jnp.where(total > 0, total, 1.0)
    objective = lambda params, part: _loss_and_gradient(params, model, part, token_weights(part) / total, chunk)
    if accumulation == 1:
        return objective(params, batch)

    def cut(rows: Array) -> Array:
        # Rows a, a + A, a + 2A, ... are microbatch a: every device contributes rows it already has.
        parts = rows.reshape(-1, accumulation, rows.shape[1]).swapaxes(0, 1)
        return sharding.constrain(parts, (None, "rows", None))

    def body(sums: tuple[Array, Any], part: Batch) -> tuple[tuple[Array, Any], None]:
        loss, gradient = objective(params, part)
        return (sums[0] + loss, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums[1], gradient)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    (loss, gradient), _ = jax.lax.scan(body, (jnp.float32(0), zeros), jax.tree.map(cut, batch))
    return loss, jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradient, params)


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
    Metrics are scalars: loss (nats per token), bits_per_byte where the batch has the `bytes` of its tokens,
    grad_norm (before clipping), param_norm, learning_rate, tokens (that the loss weighs), skipped_steps,
    nonfinite_steps, and nonfinite_leaf: the index in tree order of the first gradient leaf that is not finite (the
    number of leaves: none).

    Raises:
        ValueError: the batch does not divide over the devices.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    sharding.check_divides(config, mesh)
    rate = learning_rate_schedule(config, config.optimizer.learning_rate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradient = loss_and_gradient(
            state.params, model, batch, config.train.accumulation, config.train.loss_chunk
        )
        gradient = zero_frozen(config, gradient)
        squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradient)])
        grad_norm = jnp.sqrt(jnp.sum(squares))
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
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
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            # The rate of the update that was made: skipped steps do not move the schedule.
            "learning_rate": jnp.asarray(rate(state.step - state.skipped_steps), jnp.float32),
            "skipped_steps": new_state.skipped_steps,
            "nonfinite_steps": new_state.nonfinite_steps,
            "nonfinite_leaf": _first_nonfinite_index(squares),
        }
        return new_state, metrics | _token_metrics(loss, batch)

    everywhere = NamedSharding(mesh, P())
    states = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, mesh))
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(states, sharding.batch_sharding(mesh)),
        out_shardings=(states, everywhere),
    )


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
