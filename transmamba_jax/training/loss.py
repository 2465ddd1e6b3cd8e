"""The loss over token chunks and its gradient over microbatches, from the data and from a teacher's schedule.

    loss = sum_i w_i · (logsumexp(z_i) - z_i[target_i]) / sum_i w_i      z = logits in float32, nats per token

The weight of a token is that of the batch or 1, and 0 where its target belongs to another document or is padding.
Where a task asks for few tokens of a row, logits exist for as many positions per row as it can ask for, and no others.

Self-distillation over schedules (`train.schedule_distillation`, the share s; after slimmable networks, arXiv
1903.05134): the same parameters run under the schedule of the teacher and under that of the step, and the gradient is
that of

    (loss of the teacher + (1 - s) · loss of the step + s · KL(teacher ‖ step)) / 2

where the divergence is the mean over tokens with the same weights, and no gradient goes through the teacher's targets.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transmamba_jax import sharding
from transmamba_jax.config import Config
from transmamba_jax.data.synthetic import is_synthetic, parse
from transmamba_jax.runtime.token_loss import chunked_cross_entropy, chunked_distillation, tokens_at_a_time
from transmamba_jax.shapes import Array, Float32, Hidden, Int
from transmamba_jax.training import schedule_sampling

Batch = dict[str, Array]
"""`tokens` int32 [B, T+1]; `segment_ids` of that shape where rows are packed; `weights` float32 of that shape where
tokens are not all to be learned, such as the answers of a task or completions; `transpoints` int32 [B, L] where rows
draw them."""
Metrics = dict[str, jax.Array]

Objective = Callable[[Any, Batch], tuple[Metrics, Any]]
"""(params, batch) -> (losses in nats per token, among them `loss`, and the gradient)."""


def make_objective(config: Config, model: nn.Module) -> Objective:
    """Return the losses and the gradient that a step of `config` takes, where `model` runs the step's schedule."""
    count, share = config.train.accumulation, config.train.schedule_distillation
    chunk = tokens_at_a_time(config.train.loss_chunk, config.model.vocab_size)
    most = most_weighted(config)
    if not share:

        def from_data(params: Any, batch: Batch) -> tuple[Metrics, Any]:
            loss, gradient = loss_and_gradient(params, model, batch, count, chunk, most)
            return {"loss": loss}, gradient

        return from_data
    teacher = schedule_sampling.teacher(config, model)
    return lambda params, batch: distilled_loss_and_gradient(params, teacher, model, batch, count, chunk, share, most)


def most_weighted(config: Config) -> int | None:
    """Return the most tokens of a row that have weight, where the task says so and they are a quarter of it or less."""
    if not is_synthetic(config.data.source):
        return None
    most = parse(config.data.source).most_answers(config.data.seq_len + 1)
    return most if 4 * most <= config.data.seq_len else None


def token_weights(batch: Batch) -> Float32[Array, "B T"]:
    """Weigh the targets of a batch: its own weights or 1, and 0 for padding and the first token of a document."""
    given = batch["weights"][:, 1:] if "weights" in batch else None
    weights = jnp.ones(batch["tokens"][:, 1:].shape, jnp.float32) if given is None else given
    if "segment_ids" not in batch:
        return weights
    ids = batch["segment_ids"]
    return jnp.where((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0), weights, 0)


def loss_and_gradient(
    params: Any, model: nn.Module, batch: Batch, accumulation: int, chunk: int, most: int | None = None
) -> tuple[Float32[Array, ""], Any]:
    """Return the mean loss over the whole batch and its gradient, from `accumulation` microbatches one after another.

    Each microbatch's weights are divided by the token count of the *batch*, so the sums add up to the batch's own mean
    and gradient however unevenly the tokens are spread. `most` is a bound of the tokens of a row that have weight:
    logits exist for so many. None: for all.
    """

    def objective(part: Batch, weights: Array) -> tuple[Array, Any]:
        logits, name = _head(params, model)
        chosen = None if most is None else _weighted_positions(weights, most)
        hidden, pullback = _hidden(params, model, part, chosen)
        targets, weights = _at(part["tokens"][:, 1:], chosen), _at(weights, chosen)
        loss, gradients = chunked_cross_entropy(logits, params[name], hidden, targets, weights, chunk)
        return loss, _pull_back(pullback, name, *gradients)

    return _over_microbatches(objective, params, batch, accumulation, jnp.float32(0))


def distilled_loss_and_gradient(
    params: Any,
    teacher: nn.Module,
    model: nn.Module,
    batch: Batch,
    accumulation: int,
    chunk: int,
    share: float,
    most: int | None = None,
) -> tuple[Metrics, Any]:
    """Return the mean losses over the whole batch and the gradient of their mixture; see the module.

    Losses in nats per token: `loss` under the step's schedule, `teacher_loss`, and `distillation`, the divergence.
    """

    def objective(part: Batch, weights: Array) -> tuple[Metrics, Any]:
        logits, name = _head(params, model)
        chosen = None if most is None else _weighted_positions(weights, most)
        targets, weights = _at(part["tokens"][:, 1:], chosen), _at(weights, chosen)
        own = {name: rows for name, rows in part.items() if name != "transpoints"}
        taught, pullback = _hidden(params, teacher, own, chosen)
        teacher_loss, gradients = chunked_cross_entropy(logits, params[name], taught, targets, weights, chunk)
        first = _pull_back(pullback, name, *gradients)
        hidden, pullback = _hidden(params, model, part, chosen)
        (loss, kl), gradients = chunked_distillation(
            logits, params[name], hidden, taught, targets, weights, chunk, share
        )
        gradient = jax.tree.map(lambda a, b: (a + b) / 2, first, _pull_back(pullback, name, *gradients))
        return {"loss": loss, "teacher_loss": teacher_loss, "distillation": kl}, gradient

    zeros = {name: jnp.float32(0) for name in ("loss", "teacher_loss", "distillation")}
    return _over_microbatches(objective, params, batch, accumulation, zeros)


def _weighted_positions(weights: Float32[Array, "B T"], most: int) -> Int[Array, "B K"]:
    """Return the positions of each row that have weight, in order, filled up to `most` with others."""
    return jnp.argsort(weights == 0, axis=1, stable=True)[:, :most]


def _at(rows: Array, chosen: Int[Array, "B K"] | None) -> Array:
    """Return the chosen positions of [B, T, ...]; None: all."""
    if chosen is None:
        return rows
    return jnp.take_along_axis(rows, chosen.reshape(*chosen.shape, *(1,) * (rows.ndim - 2)), axis=1)


def _hidden(
    params: Any, model: nn.Module, batch: Batch, chosen: Int[Array, "B K"] | None
) -> tuple[Hidden, Callable[[Hidden], Any]]:
    """Return the normalised output of the last layer at chosen positions, and its VJP to the parameters."""
    inputs: Batch = {name: batch[name][:, :-1] for name in ("tokens", "segment_ids") if name in batch}
    if "transpoints" in batch:
        inputs["transpoints"] = batch["transpoints"].T
    run = partial(model.apply, **inputs, method="hidden")
    hidden, pullback = jax.vjp(lambda params: _at(run({"params": params}), chosen), params)
    return hidden, lambda dhidden: pullback(dhidden)[0]


def _head(params: Any, model: nn.Module) -> tuple[Callable[[Any, Array], Array], str]:
    """Return the function (head, hidden) -> logits, and the name of the parameter that is the head."""
    name = "lm_head" if "lm_head" in params else "embedding"
    return lambda head, part: model.apply({"params": {**params, name: head}}, part, method="logits"), name


def _pull_back(pullback: Callable[[Hidden], Any], name: str, dhead: Any, dhidden: Hidden) -> Any:
    gradient = pullback(dhidden)
    return {**gradient, name: gradient[name] + dhead}


def _over_microbatches(
    objective: Callable[[Batch, Array], tuple[Any, Any]], params: Any, batch: Batch, accumulation: int, zero: Any
) -> tuple[Any, Any]:
    """Add up (losses like `zero`, gradient) of microbatches whose weights are divided by the sum over the batch."""
    total = jnp.sum(token_weights(batch))
    total = jnp.where(total > 0, total, 1.0)
    if accumulation == 1:
        return objective(batch, token_weights(batch) / total)

    def cut(rows: Array) -> Array:
        # Rows a, a + A, a + 2A, ... are microbatch a: every device contributes rows it already has.
        parts = rows.reshape(-1, accumulation, rows.shape[1]).swapaxes(0, 1)
        return sharding.constrain(parts, (None, "rows", None))

    def body(sums: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], None]:
        losses, gradient = objective(part, token_weights(part) / total)
        added = jax.tree.map(jnp.add, sums[0], losses)
        return (added, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums[1], gradient)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    (losses, gradient), _ = jax.lax.scan(body, (zero, zeros), jax.tree.map(cut, batch))
    return losses, jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradient, params)
