"""The inside of every layer on given tokens: what it reads, what it remembers, and how it attends."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import schedule
from transmamba_jax.attention import reference
from transmamba_jax.memory_converter import memory_converter
from transmamba_jax.model import Block, TransMamba, check_tokens, check_traced, embed
from transmamba_jax.rotary import rotate
from transmamba_jax.shapes import Array, Float, Float32, Hidden, Int, SegmentIds, Tokens, TransPoint


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inspection:
    """The layers that were asked for, stacked on the first axis L in the order of `layers`."""

    layers: Int[Array, "L"]
    """Numbers of the layers, from 0."""
    transpoints: Int[Array, "L"] | Int[Array, "L B"]
    inputs: Float[Array, "L B T D"]
    """Residual stream before the layer."""
    outputs: Float[Array, "L B T D"]
    """Residual stream after the layer, MLP included."""
    q: Float[Array, "L B T G N"]
    """Q of attention before rotation, and C of the SSM."""
    k: Float[Array, "L B T G N"]
    """K of attention before rotation, and B of the SSM; q and k are rotated where `model.rotary` is "both"."""
    v: Float[Array, "L B T H P"]
    """V of attention, and X of the SSM."""
    dt: Float32[Array, "L B T H"]
    """Δ, after softplus."""
    a: Float32[Array, "L H"]
    """Decay rates A, negative: a token keeps exp(Δ A) of the state."""
    transpoint_state: Float32[Array, "L B H P N"]
    """SSM state at the TransPoint, which the Memory Converter makes; 0 where the TransPoint is 0."""
    final_state: Float32[Array, "L B H P N"]
    """SSM state after the last token, also of layers that only attend."""
    attention: Float32[Array, "L B G T T"] | None
    """Weights of the softmax from position t (first) to s (second), of each query/key group. They cover the whole row;
    the layer uses those of t < transpoint."""


def inspect(
    model: TransMamba,
    params: Any,
    tokens: Tokens | Sequence[int],
    layers: Sequence[int] | None = None,
    attention: bool = False,
    transpoints: Sequence[int] | Int[Array, "L"] | Int[Array, "L B"] | None = None,
    segment_ids: SegmentIds | None = None,
) -> Inspection:
    """Run the model on tokens and return what is inside its layers.

    `outputs` of the last layer are what the forward pass computes, by the same code compiled layer by layer: equal to
    rounding (1e-6 of their norm in float32, 1e-2 in bfloat16). States are those of the layer's own q, k, v and dt.

    Args:
        model: the model.
        params: its parameters, `{"embedding": ..., "layers": ...}`.
        tokens: int32 ids [B, T], or the ids of one row. `LanguageModel.inspect` takes a text.
        layers: numbers of the layers to return; negative ones count from the end; None: all.
        attention: return the attention maps too: L·B·G·T² numbers.
        transpoints: as for the model; None: the config's.
        segment_ids: as for the model.

    Raises:
        ValueError: a layer that the model does not have, attention maps of a model with an attention function of its
            own, a model with an ablation, or as for the model.
    """
    config = model.config
    if isinstance(tokens, str):
        raise ValueError(f"tokens must be ids, found the text {tokens[:40]!r}; tm.load(...).inspect takes a text")
    tokens = jnp.atleast_2d(jnp.asarray(tokens))
    check_tokens(tokens, segment_ids)
    if config.ablation != "none":
        raise ValueError(f"inspect needs a model with model.ablation='none', found {config.ablation!r}")
    chosen = _layers(layers, config.num_layers)
    if attention and model.attention is not None:
        raise ValueError("attention=True needs a model with softmax attention, found TransMamba(attention=...)")
    points: Any = config.transpoints if transpoints is None else transpoints
    if isinstance(points, jax.Array | np.ndarray):
        points = check_traced(points, config.num_layers, tokens.shape[0])
    else:
        points = schedule.expand(points, config.num_layers)
    block = Block(config, model.kernels, model.attention, parent=None)
    x = embed(config, params["embedding"], tokens)
    found = {}
    for index in range(max(chosen) + 1):
        layer = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        run = _static_layer if isinstance(points, tuple) else _traced_layer
        inside = run(block, points[index], attention and index in chosen, layer, x, segment_ids)
        x, found[index] = inside["outputs"], inside
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(found[index] for index in chosen))
    at = jnp.asarray(points, jnp.int32)[jnp.array(chosen)]
    return Inspection(layers=jnp.array(chosen, jnp.int32), transpoints=at, **stacked)


def _layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong or not layers:
        found = ", ".join(map(str, wrong)) or "none"
        raise ValueError(f"layers must be numbers from {-count} to {count - 1}, found {found}")
    return [layer % count for layer in layers]


def _inside(
    block: Block, transpoint: TransPoint, attention: bool, params: Any, x: Hidden, segment_ids: SegmentIds | None
) -> dict[str, Array | None]:
    variables = {"params": params}
    q, k, v, dt, a = block.apply(variables, x, segment_ids, method="projections")
    options: Any = {
        "segment_ids": segment_ids,
        "chunk_size": block.kernels.chunk_size,
        "implementation": block.kernels.ssd_choice,
    }
    weights = None
    if attention:
        turn = lambda y: rotate(y, jnp.arange(x.shape[1], dtype=jnp.int32), block.config.rope_theta)
        query, key = (turn(q), turn(k)) if block.config.rotary == "attention" else (q, k)
        weights = reference.weights(query, key, segment_ids, 1 / math.sqrt(q.shape[-1]))
    return {
        "inputs": x,
        "outputs": block.apply(variables, x, transpoint, segment_ids),
        "q": q,
        "k": k,
        "v": v,
        "dt": dt,
        "a": a,
        "transpoint_state": memory_converter(k, v, dt, a, transpoint=transpoint, **options),
        "final_state": memory_converter(k, v, dt, a, **options),
        "attention": weights,
    }


_static_layer = jax.jit(_inside, static_argnums=(0, 1, 2))
_traced_layer = jax.jit(_inside, static_argnums=(0, 2))
