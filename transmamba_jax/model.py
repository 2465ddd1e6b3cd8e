"""The language model: embedding, a stack of mixer and MLP blocks, logits.

Every leaf of the layers' parameters is stacked on a leading axis [L, ...], whatever the schedule. The forward regroups
them at trace time into L / p blocks of p unrolled layers, p the smallest period of the schedule, and scans over the
blocks: compile time does not grow with depth and one checkpoint serves every schedule.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target
from pallas_kernels.ssd import kernel_vjp
from transmamba_jax import schedule, sharding
from transmamba_jax.ablations import AblatedMixer
from transmamba_jax.attention import NAME, Attention
from transmamba_jax.cache import LayerCache
from transmamba_jax.config import KernelsConfig, ModelConfig
from transmamba_jax.mixer import Mixer, fan_in_uniform, over_tokens, residual_uniform
from transmamba_jax.norm import RMSNorm
from transmamba_jax.shapes import (
    Array,
    Dt,
    Float,
    Float32,
    HeadScalar,
    Hidden,
    Int,
    Logits,
    QueryKey,
    SegmentIds,
    Tokens,
    TransPoint,
    Value,
    known,
)

HIDDEN = ("rows", "time", None)
MLP = ("rows", "time", "width")

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(NAME, kernel_vjp.NAME),
    ),
    "full": None,
}


def embed(config: ModelConfig, embedding: Float[Array, "V D"], tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Look tokens up; the result is in the dtype of the residual stream."""
    x = embedding.astype(config.dtype)[tokens]
    return x.astype(jnp.float32) if config.residual_in_fp32 else x


@jax.custom_vjp
def _gradients_apart(values: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return `values`; their cotangents are not computed again inside every matmul that reads those.

    On a TPU, XLA fuses the backward pass of SwiGLU into each of the four matmuls that take its result: a step of the
    paper's 400M Transformer on v5e:16x16 takes 2 % less by the compiler's cycles without.
    """
    return values


_gradients_apart.defvjp(lambda values: (values, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))


class GatedMLP(nn.Module):
    """SwiGLU: (SiLU(x W_gate) ∘ x W_up) W_down, arXiv 2002.05202."""

    config: ModelConfig
    plain: bool = False

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Apply the MLP to each token."""
        cfg = self.config
        dense = partial(nn.Dense, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        gate = over_tokens(dense(cfg.mlp_dim, kernel_init=fan_in_uniform, name="gate"), x)
        up = over_tokens(dense(cfg.mlp_dim, kernel_init=fan_in_uniform, name="up"), x)
        if target.platform() == "tpu" and not self.plain:
            gate, up = _gradients_apart((gate, up))
        down = dense(cfg.d_model, kernel_init=residual_uniform(cfg.num_layers), name="down")
        # Without it the compiler spreads what is kept for the backward pass over time instead, as the loss has it.
        return over_tokens(down, sharding.constrain(nn.silu(gate) * up, MLP))


class Block(nn.Module):
    """One layer: x + Mixer(RMSNorm(x)), then x + MLP(RMSNorm(x))."""

    config: ModelConfig
    kernels: KernelsConfig = KernelsConfig()
    attention: Attention | None = None

    def setup(self) -> None:
        """Declare the parts."""
        cfg = self.config
        plain = self.kernels.any_derivative
        norm = partial(RMSNorm, cfg.norm_eps, cfg.dtype, cfg.param_dtype, plain=plain)
        mixer = Mixer if cfg.ablation == "none" else AblatedMixer
        self.mixer_norm, self.mixer = norm(), mixer(cfg, self.kernels, self.attention)
        if cfg.mlp_dim:
            self.mlp_norm, self.mlp = norm(), GatedMLP(cfg, plain)

    def __call__(self, x: Hidden, transpoint: TransPoint, segment_ids: SegmentIds | None = None) -> Hidden:
        """Apply the layer with its TransPoint."""
        return self._after(x + self.mixer(self.mixer_norm(x), transpoint, segment_ids))

    def projections(
        self, x: Hidden, segment_ids: SegmentIds | None = None
    ) -> tuple[QueryKey, QueryKey, Value, Dt, HeadScalar]:
        """Return q, k, v, dt and a of the mixer; see `Mixer.projections`."""
        return self.mixer.projections(self.mixer_norm(x), segment_ids)

    def extend(self, x: Hidden, cache: LayerCache, *arguments: Any) -> tuple[Hidden, LayerCache]:
        """Apply the layer to tokens that follow those in `cache`; arguments as for the mixer's `extend`."""
        mixed, cache = self.mixer.extend(self.mixer_norm(x), cache, *arguments)
        return self._after(x + mixed), cache

    def _after(self, x: Hidden) -> Hidden:
        return x + self.mlp(self.mlp_norm(x)) if self.config.mlp_dim else x


class TransMamba(nn.Module):
    """A causal language model whose layers switch from attention to Mamba-2 at their TransPoints.

    The schedule decides what it is: a Transformer (every TransPoint >= T), Mamba-2 (every TransPoint 0), a layer
    hybrid (0 or T per layer) or TransMamba. The parameters are the same for all of them.

    Attributes:
        config: the architecture.
        kernels: the implementations that run; any of them reads the same parameters. Gradients are reverse mode, once.
            `KernelsConfig(ssd="reference", attention="reference")` has every derivative, in both modes: jax.jvp,
            Hessian-vector products.
        attention: fn(q, k, v, segment_ids) -> y in place of `causal_attention`. q and k [B, T, G, N] are rotated, v is
            [B, T, H, P], segment_ids int32 [B, T] or None; y has the shape of v. It sees the first P tokens of a row
            under a static TransPoint P and all T under a traced one: the two agree where it is causal. Over a mesh it
            gets whole rows and some of the heads, inside `jax.shard_map`. `Decoder` refuses such a model.
    """

    config: ModelConfig
    kernels: KernelsConfig = KernelsConfig()
    attention: Attention | None = None

    def setup(self) -> None:
        """Declare the parameters."""
        cfg = self.config
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", normal, (cfg.vocab_size, cfg.d_model), cfg.param_dtype)
        if not cfg.tie_embeddings:
            self.lm_head = self.param("lm_head", normal, (cfg.d_model, cfg.vocab_size), cfg.param_dtype)
        given = self.has_variable("params", "layers")
        self.layers = self.param("layers", self._layers_to_compare if given else self._init_layers)
        self.final_norm = RMSNorm(cfg.norm_eps, cfg.dtype, cfg.param_dtype, plain=self.kernels.any_derivative)

    def __call__(
        self,
        tokens: Tokens,
        transpoints: Sequence[int] | Int[Array, "L"] | Int[Array, "L B"] | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Logits:
        """Return the logits of the token after each position.

        Args:
            tokens: int32 ids in 0..V-1. Others are not refused inside a compiled program: from V on they read the last
                row of the embedding, and negative ones count from its end, as an index does.
            transpoints: None: the config's schedule; a tuple of ints: that schedule, repeated over the layers
                (compiled for it); an int array [L] or [L, B]: one TransPoint per layer, or per layer and row, that may
                be traced and changes without compiling again.
            segment_ids: int32, equal ids are one document, 0 is padding. Attention never crosses a boundary;
                convolution and SSM state restart at it. TransPoints count tokens from the start of the row.

        Raises:
            ValueError: a shape or dtype does not fit, or the schedule is invalid.
        """
        return self.logits(self.hidden(tokens, transpoints, segment_ids))

    def initialize(self) -> None:
        """Create the parameters, for `model.init(key, method="initialize")`: no layer is traced, as for tokens."""
        self.final_norm(jnp.zeros((1, self.config.d_model), self.config.dtype))

    def hidden(
        self,
        tokens: Tokens,
        transpoints: Sequence[int] | Int[Array, "L"] | Int[Array, "L B"] | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Hidden:
        """Return the normalised output of the last layer; arguments as for the model itself."""
        cfg = self.config
        check_tokens(tokens, segment_ids)
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        x = embed(cfg, sharding.gather_parameter("embedding", self.embedding), tokens)
        x = sharding.constrain(x, HIDDEN)
        if transpoints is None:
            transpoints = cfg.transpoints
        if isinstance(transpoints, jax.Array | np.ndarray):
            x = self._traced_stack(x, check_traced(transpoints, cfg.num_layers, tokens.shape[0]), segment_ids)
        else:
            x = self._static_stack(x, schedule.expand(transpoints, cfg.num_layers), segment_ids)
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "*B_T D"]) -> Float32[Array, "*B_T V"]:
        """Project hidden states onto the vocabulary, accumulated and returned in float32."""
        kernel = self.embedding.T if self.config.tie_embeddings else self.lm_head
        # Over a mesh: the whole vocabulary for some of the tokens, on every device.
        spread = ("rows", "spread_time", None) if hidden.ndim == 3 else ("rows", None)
        kernel, hidden = sharding.constrain(kernel, (None, None)), sharding.constrain(hidden, spread)
        rows = hidden
        if hidden.ndim == 3 and sharding.parts("spread_time", hidden.shape[1]) == 1:
            rows = hidden.reshape(-1, hidden.shape[-1])  # one axis of tokens, for the reason in `over_tokens`
        logits = jnp.matmul(rows, kernel.astype(self.config.dtype), preferred_element_type=jnp.float32)
        return sharding.constrain(logits.reshape(*hidden.shape[:-1], -1), spread)

    def extend(
        self,
        tokens: Tokens,
        layers: tuple[LayerCache, ...],
        start: Int[Array, ""],
        valid: Int[Array, "B"],
        splits: schedule.Schedule,
        fresh: bool,
    ) -> tuple[Float[Array, "B D"], tuple[LayerCache, ...]]:
        """Read more tokens of every row, the first of them at position `start`.

        Args:
            tokens: the new ones, of which the first `valid` of each row are real.
            layers: what each layer remembers of the tokens before.
            start: the number of tokens before.
            valid: real tokens per row, from 0 on.
            splits: number of new tokens per layer that go through attention; the rest goes through the SSM.
            fresh: `start` is 0, which saves a look into the past.

        Returns:
            The normalised output of the last layer at each row's last real token (without meaning where there is
            none), and what the layers remember then.
        """
        x = embed(self.config, sharding.gather_parameter("embedding", self.embedding), tokens)
        x = sharding.constrain(x, HIDDEN)
        kinds = [(split, jax.tree.map(jnp.shape, layer)) for split, layer in zip(splits, layers, strict=True)]
        period = schedule.smallest_period([kinds.index(kind) for kind in kinds])
        regroup = lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:])
        stacked = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[i::period]) for i in range(period))

        def block(x: Hidden, xs: tuple[Any, tuple[LayerCache, ...]]) -> tuple[Hidden, tuple[LayerCache, ...]]:
            params, caches = xs
            done = []
            for index, cache in enumerate(caches):
                layer = {"params": sharding.gather_layer(jax.tree.map(lambda leaf: leaf[index], params))}  # noqa: B023
                x, cache = self._block().apply(layer, x, cache, start, valid, splits[index], fresh, method="extend")
                done.append(cache)
            return sharding.constrain(x, HIDDEN), tuple(done)

        x, stacked = jax.lax.scan(block, x, (jax.tree.map(regroup, self.layers), stacked))
        take = lambda index: jax.tree.map(lambda leaf: leaf[index // period], stacked[index % period])
        last = jnp.take_along_axis(x, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)
        return self.final_norm(last)[:, 0], tuple(take(index) for index in range(len(layers)))

    def _init_layers(self, key: jax.Array) -> Any:
        dummy = jnp.zeros((1, 1, self.config.d_model), self.config.dtype)
        init = lambda layer_key: self._block().init(layer_key, dummy, 0)["params"]
        return jax.vmap(init)(jax.random.split(key, self.config.num_layers))

    def _layers_to_compare(self, _: jax.Array) -> Any:
        # Flax compares given parameters with an abstract initialisation, whose trace takes as long as a forward pass.
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _layer_shapes(self.config))

    def _block(self) -> Block:
        # Detached from this module: its parameters are slices of the stack, handed over explicitly.
        return Block(self.config, self.kernels, self.attention, parent=None)

    def _layer(self, segment_ids: SegmentIds | None) -> Callable[[Any, Hidden, TransPoint], Hidden]:
        def apply(params: Any, x: Hidden, transpoint: TransPoint) -> Hidden:
            params = sharding.gather_layer(params)
            return sharding.constrain(self._block().apply({"params": params}, x, transpoint, segment_ids), HIDDEN)

        if self.config.remat == "none":
            return apply
        policy = REMAT_POLICIES[self.config.remat]

        def rematerialised(params: Any, x: Hidden, transpoint: TransPoint) -> Hidden:
            # A Python int must stay one: it is bound outside the traced arguments of jax.checkpoint.
            if isinstance(transpoint, int):
                return jax.checkpoint(lambda p, y: apply(p, y, transpoint), policy=policy)(params, x)
            return jax.checkpoint(apply, policy=policy)(params, x, transpoint)

        return rematerialised

    def _static_stack(self, x: Hidden, points: schedule.Schedule, segment_ids: SegmentIds | None) -> Hidden:
        # A TransPoint beyond the row is attention everywhere; clamping first finds the shorter period.
        if known(x.shape[1]):
            points = tuple(min(point, x.shape[1]) for point in points)
        period = schedule.smallest_period(points)
        layer = self._layer(segment_ids)
        regroup = lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:])

        def block(x: Hidden, params: Any) -> tuple[Hidden, None]:
            for index in range(period):
                x = layer(jax.tree.map(lambda leaf: leaf[index], params), x, points[index])  # noqa: B023
            return x, None

        return jax.lax.scan(block, x, jax.tree.map(regroup, self.layers), unroll=self._unroll(period))[0]

    def _traced_stack(self, x: Hidden, points: Array, segment_ids: SegmentIds | None) -> Hidden:
        layer = self._layer(segment_ids)

        def step(x: Hidden, xs: tuple[Any, Array]) -> tuple[Hidden, None]:
            params, point = xs
            return layer(params, x, point), None

        return jax.lax.scan(step, x, (self.layers, points), unroll=self._unroll(1))[0]

    def _unroll(self, period: int) -> int:
        """Return the turns of a loop over blocks of `period` layers that are compiled as one.

        A loop writes what the backward pass needs into stacked arrays and reads it back, layer by layer.
        """
        blocks, most = self.config.num_layers // period, max(1, (self.kernels.unrolled_layers or 1) // period)
        return max(turns for turns in range(1, blocks + 1) if blocks % turns == 0 and turns <= most)


def check_tokens(tokens: Tokens, segment_ids: SegmentIds | None) -> None:
    """Raise a ValueError unless tokens and segment ids are integers [B, T]."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], found shape {tokens.shape}, dtype {tokens.dtype}")
    if tokens.shape[1] < 1:
        raise ValueError(f"tokens must have at least one token a row, found shape {tokens.shape}")
    if segment_ids is None:
        return
    if segment_ids.shape != tokens.shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers of the tokens' shape {tokens.shape}, "
            f"found shape {segment_ids.shape}, dtype {segment_ids.dtype}"
        )


def check_traced(transpoints: Array | np.ndarray, num_layers: int, batch: int) -> Array:
    """Return TransPoints as an array; raise a ValueError unless they are integers [L] or [L, B]."""
    shape, dtype = transpoints.shape, transpoints.dtype
    if shape not in ((num_layers,), (num_layers, batch)) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"transpoints must be a tuple of ints or an integer array of shape ({num_layers},) or "
            f"({num_layers}, {batch}), one per layer or per layer and row, found shape {shape}, dtype {dtype}"
        )
    return jnp.asarray(transpoints)


@lru_cache(maxsize=32)
def _layer_shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(TransMamba(config)._init_layers, jax.random.key(0))
