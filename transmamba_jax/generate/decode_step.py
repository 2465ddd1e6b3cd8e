"""One token through one layer, from weights packed for that: the mixer and the MLP with few, large matmuls.

The equations are those of `mixer.py` without the parts that a single token does not need; tests hold the two together.
Time goes into reading the weights, so each is read once: q, k, v and dt come from one matmul, both halves of the gated
MLP from another, and the gate z is read only where the SSM runs.
"""

import dataclasses
import enum
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import cache as memory
from transmamba_jax import parallel, sharding
from transmamba_jax.cache import LayerCache
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.mixer import compute_dt
from transmamba_jax.norm import rms_norm
from transmamba_jax.rotary import rotate
from transmamba_jax.shapes import Array, Float, Float32, HeadScalar, Int, State


class Branch(enum.Enum):
    """Branches of a layer that run for the next token."""

    ATTENTION = "attention"
    SSM = "ssm"
    MIXED = "mixed"


class LayerMode(NamedTuple):
    """The branch of a layer at the next token; MIXED: rows before `transpoint` attend, the others read the SSM."""

    branch: Branch
    transpoint: int = 0
    """0 unless MIXED, so that layers of one branch share a program."""


def layer_mode(point: int, lengths: np.ndarray) -> LayerMode:
    """Return the mode of a layer with TransPoint `point` at the next token of rows of these lengths."""
    attending = lengths < point
    if attending.all():
        return LayerMode(Branch.ATTENTION)
    return LayerMode(Branch.MIXED, point) if attending.any() else LayerMode(Branch.SSM)


# Over a mesh, one token's activations are whole on every device but for rows and heads: a gather of so little is short.
_ROWS = ("rows", None)
_HEADS = ("rows", "heads", None)


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPWeights:
    """The gated MLP; matrices in the compute dtype, the norm's scale as stored."""

    norm: Float[Array, "D"]
    gate_up: Float[Array, "D 2M"]
    down: Float[Array, "M D"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer; C = 2GN + HP channels of q, k and v side by side. Matrices in the compute dtype, the rest float32."""

    norm: Float[Array, "D"]
    inputs: Float[Array, "D _"]
    """q, k, v and Δ."""
    taps: Float32[Array, "K C"]
    bias: Float32[Array, "C"]
    dt_bias: HeadScalar
    a: HeadScalar
    """Decay rates, negative."""
    skip: HeadScalar | None
    gate: Float[Array, "D HP"]
    out_norm: Float[Array, "G _"]
    out: Float[Array, "HP D"]
    mlp: MLPWeights | None


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Packed parameters of a model: each layer's apart, since a slice of a stack is a copy."""

    embedding: Float[Array, "V D"]
    head: Float[Array, "D V"] | None
    """None: the embedding."""
    final_norm: Float[Array, "D"]
    layers: tuple[LayerWeights, ...]


def pack_weights(config: ModelConfig, params: Any) -> Weights:
    """Pack the parameters of a model for `layer_step`."""
    # Over a mesh: what fsdp cuts is collected once, not at every token; what tensor cuts stays so.
    layer = lambda index: sharding.gather_layer(jax.tree.map(lambda leaf: leaf[index], params["layers"]))
    whole = lambda name: sharding.gather_parameter(name, params[name]).astype(config.dtype)
    return Weights(
        embedding=whole("embedding"),
        head=None if config.tie_embeddings else whole("lm_head"),
        final_norm=params["final_norm"]["scale"],
        layers=tuple(_pack_layer(config, layer(index)) for index in range(config.num_layers)),
    )


def _pack_layer(config: ModelConfig, params: Any) -> LayerWeights:
    """Pack the parameters of one block."""
    mixer = params["mixer"]
    side_by_side = lambda *parts: jnp.concatenate([part["kernel"] for part in parts], axis=1).astype(config.dtype)
    # Over a mesh a device holds some of the columns, or of the rows where heads or an MLP's width come in.
    matrix = lambda *parts: sharding.constrain(side_by_side(*parts), (None, "heads"))
    rows = lambda part: sharding.constrain(side_by_side(part), ("heads", None))
    wide = lambda array: array.astype(jnp.float32)
    convolutions = [mixer[f"conv_{name}"] for name in "qkv"]
    taps = wide(jnp.concatenate([conv["kernel"] for conv in convolutions], axis=1))
    bias = jnp.zeros(taps.shape[1], jnp.float32)
    if config.conv_bias:
        bias = wide(jnp.concatenate([conv["bias"] for conv in convolutions]))
    mlp = None
    if config.mlp_dim:
        parts = params["mlp"]
        mlp = MLPWeights(params["mlp_norm"]["scale"], matrix(parts["gate"], parts["up"]), rows(parts["down"]))
    return LayerWeights(
        norm=params["mixer_norm"]["scale"],
        inputs=matrix(mixer["q"], mixer["k"], mixer["v"], mixer["dt"]),
        taps=sharding.constrain(taps, (None, None)),
        bias=sharding.constrain(bias, (None,)),
        dt_bias=wide(mixer["dt_bias"]),
        a=-jnp.exp(wide(mixer["a_log"])),
        skip=wide(mixer["skip"]) if config.use_d_skip else None,
        gate=matrix(mixer["z"]),
        out_norm=mixer["norm"]["scale"],
        out=rows(mixer["out"]),
        mlp=mlp,
    )


def layer_step(
    config: ModelConfig,
    weights: LayerWeights,
    x: Float[Array, "B D"],
    cache: LayerCache,
    staging: LayerCache,
    starts: Int[Array, "B"],
    index: Int[Array, ""],
    mode: LayerMode,
) -> tuple[Float[Array, "B D"], LayerCache, LayerCache]:
    """Apply one block to the token at position starts + index of each row and remember it.

    The window and the state advance in `cache`; a key and a value go to slot `index` of `staging`.
    """
    normed = _norm(config, x, weights.norm)
    mixed, cache, staging = _mix(config, weights, normed, cache, staging, starts, index, mode)
    x = sharding.constrain(x + mixed @ weights.out, _ROWS)
    if weights.mlp is None:
        return x, cache, staging
    both = sharding.constrain(_norm(config, x, weights.mlp.norm) @ weights.mlp.gate_up, _ROWS)
    gate, up = jnp.split(both, 2, axis=-1)
    return sharding.constrain(x + (jax.nn.silu(gate) * up) @ weights.mlp.down, _ROWS), cache, staging


def next_logits(
    config: ModelConfig,
    x: Float[Array, "B D"],
    final_norm: Float[Array, "D"],
    embedding: Float[Array, "V D"],
    head: Float[Array, "D V"] | None,
) -> Float32[Array, "B V"]:
    """Return the logits of the next token from the output of the last block, accumulated in float32."""
    normed = _norm(config, x, final_norm)
    logits = jnp.matmul(normed, embedding.T if head is None else head, preferred_element_type=jnp.float32)
    return sharding.constrain(logits, _ROWS)


def convert(config: ModelConfig, kernels: KernelsConfig, weights: LayerWeights, cache: LayerCache) -> State:
    """Return the SSM state after the cached tokens: the Memory Converter on the cached keys and values.

    Raises:
        ValueError: the cache has no keys, values or steps.
    """
    if cache.keys is None or cache.values is None or cache.dt is None:
        raise ValueError("cache must hold keys, values and steps to be converted")
    keys = cache.keys.swapaxes(1, 2)
    if config.rotary == "attention":
        # The SSM's keys are not rotated: turn them back, in float32 so that nothing is rounded again.
        keys = rotate(keys.astype(jnp.float32), -jnp.arange(keys.shape[1]), config.rope_theta)
    values = cache.values.swapaxes(1, 2).astype(keys.dtype)
    options: dict[str, Any] = {"chunk_size": kernels.chunk_size, "implementation": kernels.ssd_choice}
    return parallel.convert(keys, values, cache.dt, weights.a, None, **options)


def _mix(
    config: ModelConfig,
    weights: LayerWeights,
    x: Float[Array, "B D"],
    cache: LayerCache,
    staging: LayerCache,
    starts: Int[Array, "B"],
    index: Int[Array, ""],
    mode: LayerMode,
) -> tuple[Float[Array, "B HP"], LayerCache, LayerCache]:
    positions = starts + index
    projected = sharding.constrain(x @ weights.inputs, _ROWS)
    channels = weights.taps.shape[1]
    taps = jnp.concatenate([cache.window, projected[:, None, :channels]], axis=1)  # [B, K, C]
    convolved = jnp.sum(taps.astype(jnp.float32) * weights.taps[None], axis=1) + weights.bias[None]
    activate = jax.nn.silu if config.conv_activation == "silu" else lambda y: y
    q, k, v = jnp.split(activate(convolved.astype(x.dtype)), (config.d_key, 2 * config.d_key), axis=-1)
    q, k = (y.reshape(-1, config.num_groups, config.state_dim) for y in (q, k))
    v = v.reshape(-1, config.num_heads, config.head_dim)
    q, k, v = (sharding.constrain(y, _HEADS) for y in (q, k, v))
    dt = compute_dt(config, projected[:, channels:], weights.dt_bias)
    turn = lambda y: rotate(y[:, None], positions[:, None], config.rope_theta)[:, 0]
    if config.rotary == "both":
        q, k = turn(q), turn(k)
    state = cache.state
    if state is not None:
        state = memory.step_state(state, dt, weights.a, k, v)
    cache = dataclasses.replace(cache, window=taps[:, 1:], state=state)
    scanned = None if mode.branch is Branch.ATTENTION else _read(config, weights, x, q, v, state)
    if scanned is not None and mode.branch is Branch.SSM:
        return scanned, cache, staging
    if config.rotary == "attention":
        q, k = turn(q), turn(k)
    staging = memory.write(staging, k[:, None], v[:, None], dt[:, None], index)
    attended = memory.attend_once(q, cache, staging, starts, index).reshape(x.shape[0], -1)
    if config.attention_norm:
        attended = _norm(config, attended, weights.out_norm)
    if scanned is None:
        return attended, cache, staging
    return jnp.where((positions < mode.transpoint)[:, None], attended, scanned), cache, staging


def _read(
    config: ModelConfig,
    weights: LayerWeights,
    x: Float[Array, "B D"],
    q: Float[Array, "B G N"],
    v: Float[Array, "B H P"],
    state: State | None,
) -> Float[Array, "B HP"]:
    """Return the SSM's output at the token after which the state is `state`."""
    if state is None:
        raise ValueError(
            "cache must hold the SSM state of the tokens before; convert the keys and values of attention first"
        )
    y = memory.read_state(state, q)
    if weights.skip is not None:
        y = y + weights.skip[None, :, None] * v.astype(jnp.float32)
    y = y.astype(v.dtype).reshape(x.shape[0], -1)
    return _norm(config, y * jax.nn.silu(x @ weights.gate), weights.out_norm)


def _norm(config: ModelConfig, x: Float[Array, "B C"], weight: Float[Array, "..."]) -> Float[Array, "B C"]:
    return rms_norm(x, weight, config.norm_eps).astype(config.dtype)
