"""The memory of a model between two calls: windows, states, and the keys and values of layers that still attend.

A layer with TransPoint P keeps, for rows of n tokens so far,

    window   the last K - 1 inputs of its convolutions                      always
    keys, values   of min(P, n) tokens at most, keys as attention reads them   while a row is before P
    state    the SSM state after n tokens, float32                           from P on; before P too when kept eagerly
    dt       Δ of those tokens, float32                                      while the state is left for later

so the memory of a layer falls to window and state once every row is past P. The state is either carried along from the
first token (eager) or computed from keys, values and dt when P is reached (lazy); it is the same state.
"""

import dataclasses
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import schedule, sharding
from transmamba_jax.attention import Keys, Values, matmul_dtype
from transmamba_jax.config import ModelConfig
from transmamba_jax.shapes import Array, Dt, Float, Float32, HeadScalar, Int, QueryKey, State, Value

# Names of the dimensions, as sharding.ACTIVATIONS has them.
_LAYOUTS = {
    "window": ("rows", None, None),
    "state": ("rows", "heads", None, None),
    "keys": ("rows", "heads", None, None),
    "values": ("rows", "heads", None, None),
    "dt": ("rows", None, "heads"),
}

# Tokens. Attention reads the whole capacity: the first costs little to read, and the second little to keep.
_LEAST_ROOM, _FIRST_ROOM = 256, 2048


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's memory; None is what it does not need (any more, or yet). S is the capacity in tokens."""

    window: Float[Array, "B J C"]
    """Last J = K - 1 inputs of the convolutions over q, k and v, side by side, compute dtype."""
    state: State | None = None
    keys: Keys | None = None
    values: Values | None = None
    dt: Float32[Array, "B S H"] | None = None
    """0 where no token is: a step of 0 leaves a state alone."""

    @property
    def capacity(self) -> int:
        """Tokens that keys and values can hold."""
        return 0 if self.keys is None else self.keys.shape[2]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The memory of a model, one row a sequence; sequences may have different lengths."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]
    """Tokens read so far."""
    transpoints: schedule.Schedule = dataclasses.field(metadata={"static": True})
    """One for each layer."""


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int = 0,
    transpoints: schedule.Schedule | None = None,
    lazy: bool = True,
) -> Cache:
    """Return the memory of `batch` empty rows; a layer can hold min(TransPoint, capacity) tokens.

    Args:
        config: the model's.
        batch: rows.
        capacity: tokens that may follow before the cache has to grow.
        transpoints: schedule, repeated over the layers; None: the config's.
        lazy: compute the SSM state at the TransPoint from what attention keeps, instead of carrying it along.

    Raises:
        ValueError: the schedule is invalid, or batch < 1 or capacity < 0.
    """
    if batch < 1 or capacity < 0:
        raise ValueError(f"batch must be >= 1 and capacity >= 0, found batch={batch}, capacity={capacity}")
    points = schedule.expand(config.transpoints if transpoints is None else transpoints, config.num_layers)
    layers = tuple(init_layer(config, batch, min(point, capacity), lazy) for point in points)
    return Cache(layers, jnp.zeros(batch, jnp.int32), points)


def init_layer(config: ModelConfig, batch: int, capacity: int, lazy: bool) -> LayerCache:
    """Return the memory of one layer before any token; `lazy` matters where `capacity` > 0."""
    # Zeros by numpy: each shape made by XLA would be a program to compile.
    zeros = lambda dtype, *shape: jnp.array(np.zeros((batch, *shape), jnp.dtype(dtype)))
    attends, pending = capacity > 0, capacity > 0 and lazy
    return LayerCache(
        window=zeros(config.dtype, config.conv_width - 1, 2 * config.d_key + config.d_inner),
        state=None if pending else zeros("float32", config.num_heads, config.head_dim, config.state_dim),
        keys=zeros(config.dtype, config.num_groups, capacity, config.state_dim) if attends else None,
        values=zeros(config.dtype, config.num_heads, capacity, config.head_dim) if attends else None,
        dt=zeros("float32", capacity, config.num_heads) if pending else None,
    )


def spread(layer: LayerCache) -> LayerCache:
    """Put rows and heads where the mesh of `jax.set_mesh` has them; without one, do nothing."""
    kept = {name: array for name, array in vars(layer).items() if array is not None}
    return LayerCache(**{name: sharding.constrain(array, _LAYOUTS[name]) for name, array in kept.items()})


def cache_bytes(
    config: ModelConfig, batch: int, length: int, point: int, lazy: bool = True, capacity: int | None = None
) -> int:
    """Return the bytes that one layer with TransPoint `point` needs after `length` tokens: the formula.

        B · [ (K - 1)(2GN + HP) d  +  4 HPN (state)  +  S ((GN + HP) d  +  4 H if lazy) ]

    d bytes of the compute dtype. The state is absent before P when lazy, keys and values from P on. S is the least that
    is needed, `length`; or `capacity`, such as min(P, `choose_capacity`), to which a decoder rounds it up.
    """
    itemsize = jnp.dtype(config.dtype).itemsize
    attends = length < point
    total = (config.conv_width - 1) * (2 * config.d_key + config.d_inner) * itemsize
    if not attends or not lazy:
        total += 4 * config.d_inner * config.state_dim
    if attends:
        total += (length if capacity is None else capacity) * (
            (config.d_key + config.d_inner) * itemsize + 4 * config.num_heads * lazy
        )
    return batch * total


def nbytes(tree: object) -> int:
    """Return the bytes of the arrays of a cache, or of anything else."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def choose_capacity(end: int, total: int | None, points: schedule.Schedule) -> int:
    """Return the capacity of a layer that attends up to position `end`, in steps so coarse that programs are few.

        S = min(next TransPoint >= end,  max(2048, 2·2^⌈log2 end⌉),  max(256, 2^⌈log2 total⌉) where it is known)

    From the next TransPoint on fewer layers need any, and another program runs. Attention reads all of it, hence
    not many more than four times the tokens. `total` is the length that the longest row is going to have.
    """
    power = lambda tokens: 1 << (max(tokens, 1) - 1).bit_length()
    known = [] if total is None else [max(_LEAST_ROOM, power(max(total, end)))]
    return min([max(_FIRST_ROOM, 2 * power(end)), *known, *(point for point in points if point >= end)])


def resize(layer: LayerCache, capacity: int) -> LayerCache:
    """Return the layer with another capacity in tokens; those beyond it are forgotten."""
    if layer.keys is None or layer.values is None or capacity == layer.capacity:
        return layer
    more = capacity - layer.capacity

    def fit(array: Array, axis: int) -> Array:
        if more < 0:
            return jax.lax.slice_in_dim(array, 0, capacity, axis=axis)
        return jnp.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])

    return dataclasses.replace(
        layer,
        keys=fit(layer.keys, 2),
        values=fit(layer.values, 2),
        dt=None if layer.dt is None else fit(layer.dt, 1),
    )


def write(layer: LayerCache, keys: QueryKey, values: Value, dt: Dt, start: Int[Array, ""]) -> LayerCache:
    """Store n tokens of every row from place `start` on; they must fit the capacity."""
    if layer.keys is None or layer.values is None:
        return layer
    put = lambda whole, part, axis: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis)
    return dataclasses.replace(
        layer,
        keys=put(layer.keys, keys.swapaxes(1, 2), 2),  # [B, n, G, N] -> [B, G, n, N]
        values=put(layer.values, values.swapaxes(1, 2), 2),
        dt=None if layer.dt is None else put(layer.dt, dt, 1),
    )


def staging_layer(layer: LayerCache, steps: int) -> LayerCache:
    """Return an empty staging buffer for the next `steps` tokens of a layer that attends, beside its large cache.

    Within a program the large cache is only read: XLA would copy it whole for each token that is both written and read.
    """
    if layer.keys is None or layer.values is None:
        return LayerCache(window=layer.window[:, :0])
    like = lambda array, axis: jnp.zeros((*array.shape[:axis], steps, *array.shape[axis + 1 :]), array.dtype)
    return LayerCache(
        window=layer.window[:, :0],
        keys=like(layer.keys, 2),
        values=like(layer.values, 2),
        dt=None if layer.dt is None else like(layer.dt, 1),
    )


def flush(layer: LayerCache, staging: LayerCache, starts: Int[Array, "B"], steps: Int[Array, ""] | int) -> LayerCache:
    """Store the first `steps` staged tokens of each row from `starts` on; those beyond the capacity are dropped."""
    if layer.keys is None or layer.values is None or staging.keys is None or staging.values is None:
        return layer
    index = jnp.arange(staging.keys.shape[2], dtype=jnp.int32)
    places = jnp.where((index < steps)[None], starts[:, None] + index[None], layer.capacity)  # [B, steps]
    rows = jnp.arange(starts.shape[0], dtype=jnp.int32)[:, None]
    put = lambda whole, part: whole.at[rows, :, places].set(part.swapaxes(1, 2), mode="drop")
    waiting = layer.dt
    if waiting is not None and staging.dt is not None:
        waiting = waiting.at[rows, places].set(staging.dt, mode="drop")
    return dataclasses.replace(
        layer, keys=put(layer.keys, staging.keys), values=put(layer.values, staging.values), dt=waiting
    )


def shift_window(
    window: Float[Array, "B J C"], inputs: Float[Array, "B n C"], valid: Int[Array, "B"] | None
) -> Float[Array, "B J C"]:
    """Return the last J inputs after the first `valid` of the new ones (None: after all of them)."""
    joined = jnp.concatenate([window, inputs], axis=1)
    if valid is None:
        return joined[:, inputs.shape[1] :]
    places = valid[:, None] + jnp.arange(window.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(joined, places[..., None], axis=1)


def attend_once(
    q: Float[Array, "B G N"], layer: LayerCache, staging: LayerCache, starts: Int[Array, "B"], index: Int[Array, ""]
) -> Float[Array, "B H P"]:
    """Attend from one token of each row to the `starts` cached tokens and to the staging ones up to `index`, its own.

    The whole capacity is read: plain matmuls of a vector, at the speed of memory, are faster than a loop over blocks
    that hold tokens. Scores, statistics and accumulation are float32.

    Raises:
        ValueError: the layer's capacity is 0.
    """
    if layer.keys is None or layer.values is None or staging.keys is None or staging.values is None:
        raise ValueError("cache must hold the keys and values of a layer that attends; its capacity is 0")
    shared = layer.values.shape[1] // layer.keys.shape[1]
    operand = matmul_dtype(q.dtype)
    dot = lambda equation, x, y: jnp.einsum(
        equation, x.astype(operand), y.astype(operand), preferred_element_type=jnp.float32
    )
    before = jnp.arange(layer.capacity, dtype=jnp.int32)[None, None] < starts[:, None, None]
    upto = jnp.arange(staging.capacity, dtype=jnp.int32) <= index
    score = jnp.concatenate(
        [
            jnp.where(before, dot("bgn,bgsn->bgs", q, layer.keys), -jnp.inf),
            jnp.where(upto, dot("bgn,bgsn->bgs", q, staging.keys), -jnp.inf),
        ],
        axis=-1,
    )
    weight = jnp.repeat(jax.nn.softmax(score / math.sqrt(q.shape[-1]), axis=-1), shared, axis=1)
    read = dot("bhs,bhsp->bhp", weight[..., : layer.capacity], layer.values)
    read += dot("bhs,bhsp->bhp", weight[..., layer.capacity :], staging.values)
    return read.astype(layer.values.dtype)


def step_state(
    state: State, dt: Float32[Array, "B H"], a: HeadScalar, b: Float[Array, "B G N"], x: Float[Array, "B H P"]
) -> State:
    """Return h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t b_tᵀ, the recurrence of one token, in float32."""
    heads, groups = x.shape[1], b.shape[1]
    b = jnp.repeat(b.astype(jnp.float32), heads // groups, axis=1)
    dtx = dt[..., None] * x.astype(jnp.float32)
    return jnp.exp(dt * a[None])[..., None, None] * state + dtx[..., None] * b[:, :, None, :]


def read_state(state: State, c: Float[Array, "B G N"]) -> Float32[Array, "B H P"]:
    """Return h_t c_t."""
    batch, heads, channels, width = state.shape
    grouped = state.reshape(batch, c.shape[1], -1, width)
    return jnp.einsum("bgpn,bgn->bgp", grouped, c.astype(jnp.float32)).reshape(batch, heads, channels)


def bucket(tokens: int) -> int:
    """Round a number of tokens up, by a quarter at most beyond 64, so that few lengths are ever compiled for."""
    step = max(16, 1 << max(int(tokens).bit_length() - 3, 0))
    return -(-tokens // step) * step
