"""The layer's operators over a mesh: every device runs the ordinary one on its own rows, heads and tokens.

Projections, norms, MLP and loss are left to the compiler, which needs only shardings. The operators are loops and
kernels that it does not cut well, so they run inside `jax.shard_map` over the mesh of `jax.set_mesh`; without a mesh
they are the plain functions. Rows and heads are independent. Along the sequence (mesh axis context):

    convolution  a shard takes the last K - 1 tokens of the shard before it.
    SSM          shard s reduces its tokens to what they do to a state, h -> g_s h + u_s: the decay over all of them and
                 the state that they leave. One gather of (g, u), whose size does not depend on T; then the state
                 before shard s is h_s = g_{s-1} h_{s-1} + u_{s-1}, and the shard runs from there. It is the Memory
                 Converter's algebra, and the state at the TransPoint is one of the states on the way.
    attention    the tokens before the TransPoint are split over heads instead: every shard has all of them for some
                 of the heads, which is equal work for every shard under a causal mask, with the ordinary kernels.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import Choice, decay, ssd, ssd_state
from transmamba_jax.attention import Attention, Keys, Values, cached_attention
from transmamba_jax.convolution import causal_conv
from transmamba_jax.memory_converter import memory_converter
from transmamba_jax.shapes import Array, Dt, Float, HeadScalar, Int, QueryKey, SegmentIds, State, Value
from transmamba_jax.sharding import constrain, parts, per_shard

_TOKENS = ("rows", "time")
_WHOLE = ("rows", None)
_SCALARS = ("heads",)
_STATE = ("rows", "heads", None, None)


def splits_time(length: Any) -> bool:
    """Tell whether the tokens of rows of this length are split over devices."""
    return parts("time", length) > 1


def convolve(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "K C"],
    bias: Float[Array, "C"],
    segment_ids: SegmentIds | None,
    *,
    silu: bool = False,
    plain: bool = False,
) -> Float[Array, "B T C"]:
    """Apply `causal_conv`."""
    shards, reach = parts("time", x.shape[1]), kernel.shape[0] - 1
    channels = (*_TOKENS, "heads")
    layouts = channels, (None, "heads"), _SCALARS, _TOKENS
    if shards == 1 or reach == 0:
        return per_shard(partial(causal_conv, silu=silu, plain=plain), layouts, channels, x, kernel, bias, segment_ids)
    if x.shape[1] // shards < reach:
        raise ValueError(
            f"mesh.context={shards} leaves {x.shape[1] // shards} tokens to a device, and the convolution reaches "
            f"back {reach}; use fewer parts or longer rows"
        )
    before = [(shard, shard + 1) for shard in range(shards - 1)]  # the first shard receives zeros

    def shard(x: Array, kernel: Array, bias: Array, segment_ids: Array | None) -> Array:
        x = _with_halo(x, reach, before)
        ids = None if segment_ids is None else _with_halo(segment_ids, reach, before)
        return causal_conv(x, kernel, bias, ids, silu=silu, plain=plain)[:, reach:]

    return per_shard(shard, layouts, channels, x, kernel, bias, segment_ids)


def attend(q: QueryKey, k: QueryKey, v: Value, segment_ids: SegmentIds | None, attention: Attention) -> Value:
    """Apply `attention` to all tokens of the rows, split over heads.

    Raises:
        ValueError: its result has another shape than `v`.
    """

    def run(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        y = attention(q, k, v, segment_ids)
        if y.shape != v.shape:
            raise ValueError(f"attention must return the shape [B, T, H, P] of v, {v.shape}, found {y.shape}")
        return y.astype(v.dtype)

    heads, groups = v.shape[2], q.shape[2]
    if parts("spread_heads", heads) > parts("spread_heads", groups):
        # A group's queries and keys serve several heads; here those live on different devices, and all get all groups:
        # left alone, the compiler spreads the groups over some of the devices, in the backward pass too.
        q, k = (constrain(array, (*_WHOLE, None, None)) for array in (q, k))
        q, k = (jnp.repeat(array, heads // groups, axis=2) for array in (q, k))
    spread = (*_WHOLE, "spread_heads", None)
    y = per_shard(run, (spread, spread, spread, _WHOLE), spread, q, k, v, segment_ids)
    # What follows is over tokens: its statistics over groups would otherwise be cut as the heads are.
    return constrain(y, (*_TOKENS, "heads", None)) if splits_time(y.shape[1]) else y


def attend_cached(q: QueryKey, keys: Keys, values: Values, start: Int[Array, ""]) -> Value:
    """Apply `cached_attention`."""
    tokens, slots = (*_WHOLE, "heads", None), ("rows", "heads", None, None)
    return per_shard(cached_attention, (tokens, slots, slots, ()), tokens, q, keys, values, start)


def convert(
    k: QueryKey,
    v: Value,
    dt: Dt,
    a: HeadScalar,
    segment_ids: SegmentIds | None,
    initial_state: State | None = None,
    *,
    chunk_size: int,
    implementation: Choice,
) -> State:
    """Apply `memory_converter` to all tokens of the rows."""

    def shard(k: Array, v: Array, dt: Array, a: Array, ids: Array | None, state: Array | None) -> Array:
        options: dict[str, Any] = {"chunk_size": chunk_size, "implementation": implementation}
        return memory_converter(k, v, dt, a, initial_state=state, segment_ids=ids, **options)

    heads = (*_WHOLE, "heads")
    layouts = ((*heads, None), (*heads, None), heads, _SCALARS, _WHOLE, _STATE)
    return per_shard(shard, layouts, _STATE, k, v, dt, a, segment_ids, initial_state)


def scan(
    x: Value,
    dt: Dt,
    a: HeadScalar,
    b: QueryKey,
    c: QueryKey,
    d: HeadScalar | None,
    initial_state: State | None,
    segment_ids: SegmentIds | None,
    *,
    chunk_size: int,
    implementation: Choice,
    output_start: int = 0,
) -> tuple[Float[Array, "B _ H P"], State]:
    """Apply `ssd`. With the tokens split over devices there is no initial state and no `output_start`.

    Raises:
        ValueError: an initial state or an `output_start`, and tokens that are split over devices.
    """
    run = partial(ssd, chunk_size=chunk_size, implementation=implementation, output_start=output_start)
    split = splits_time(x.shape[1])
    if split:
        if initial_state is not None:
            raise ValueError("initial_state must be None where mesh.context splits the rows: the first shard starts")
        if output_start:
            raise ValueError(
                f"output_start must be 0 where mesh.context splits the rows, found {output_start}: slice y instead"
            )
        run = partial(_scan_shard, chunk_size=chunk_size, implementation=implementation)
    tokens = _TOKENS if split else _WHOLE
    heads = (*tokens, "heads")
    wide = (*heads, None)
    layouts = (wide, heads, _SCALARS, wide, wide, _SCALARS, _STATE, tokens)
    return per_shard(run, layouts, (wide, _STATE), x, dt, a, b, c, d, initial_state, segment_ids)


def _scan_shard(
    x: Value,
    dt: Dt,
    a: HeadScalar,
    b: QueryKey,
    c: QueryKey,
    d: HeadScalar | None,
    _: None,
    segment_ids: SegmentIds | None,
    *,
    chunk_size: int,
    implementation: Choice,
) -> tuple[Value, State]:
    """Scan this shard's tokens from the state after the shards before it."""
    options: dict[str, Any] = {"segment_ids": segment_ids, "chunk_size": chunk_size, "implementation": implementation}
    decays = jnp.exp(jnp.sum(decay.log_decays(dt, a, segment_ids)[1], axis=1))
    states = ssd_state(x, dt, a, b, **options)
    edges = None if segment_ids is None else _edges(segment_ids)
    before, final = _states_between(*jax.lax.all_gather((decays, states, edges), "context"))
    mine = jax.lax.axis_index("context")
    initial = jax.lax.dynamic_index_in_dim(before, mine, keepdims=False)
    y = ssd(x, dt, a, b, c, d=d, initial_state=initial, **options)[0]
    return y, final


def _states_between(
    decays: Float[Array, "S B H"], states: Float[Array, "S B H P N"], edges: tuple[Array, Array] | None
) -> tuple[Float[Array, "S B H P N"], State]:
    """Return the state before every shard, 0 where the shard begins with a document of its own, and the last state."""
    state = jnp.zeros_like(states[0])
    last = jnp.zeros(states.shape[1], jnp.int32)
    before = []
    for shard in range(states.shape[0]):
        if edges is not None:
            first = edges[0][shard]
            # A shard of padding alone (first = 0) does not change the state.
            same = (first == last) | (first == 0)
            state = jnp.where(same[:, None, None, None], state, 0)
            last = jnp.where(first == 0, last, edges[1][shard])
        before.append(state)
        state = decays[shard][..., None, None] * state + states[shard]
    return jnp.stack(before), state


def _edges(segment_ids: SegmentIds) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Return the first and the last id that is not padding, 0 where all is."""
    real = segment_ids != 0
    pick = lambda index: jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]
    first = jnp.argmax(real, axis=1)
    last = segment_ids.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return pick(first), pick(last)


def _with_halo(x: Array, reach: int, before: list[tuple[int, int]]) -> Array:
    halo = jax.lax.ppermute(x[:, -reach:], "context", before)
    return jnp.concatenate([halo, x], axis=1)
