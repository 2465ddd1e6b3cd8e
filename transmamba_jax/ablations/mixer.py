"""The mixer with one part changed, for studies: `model.ablation`.

    zero_state             h_P = 0: the SSM knows nothing of the tokens before the TransPoint
    converter_without_dt   h_P = sum_i exp(sum_{j>i} Δ_j A) · V_i K_iᵀ, without Δ_i on V_i: the Memory Converter as
                           Eq. 9 of arXiv 2503.24067 prints it
    gated_attention        z gates both branches: RMSNorm(attention ∘ SiLU(z)); "global z" of Table 10
    separate_weights       attention has projections and convolutions of its own for q, k and v; z, the norm and the
                           output projection stay shared, and the converter reads the SSM's k and v

Both branches run over the whole row and are selected, which is the definition of the layer, whether the TransPoint is
static or traced. That costs more than the sliced mixer and keeps that one free of variants. Such a model has no
decoding.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool

from transmamba_jax.mixer import Mixer, ShortConv, fan_in_uniform, over_tokens
from transmamba_jax.shapes import Array, Float, Hidden, QueryKey, SegmentIds, TransPoint, Value


class AblatedMixer(Mixer):
    """The mixer under `config.ablation`; the parameters are the mixer's, with further ones for separate weights."""

    def setup(self) -> None:
        """Declare the parameters."""
        super().setup()
        cfg = self.config
        if cfg.ablation == "separate_weights":
            dense = partial(
                nn.Dense, use_bias=False, dtype=cfg.dtype, param_dtype=cfg.param_dtype, kernel_init=fan_in_uniform
            )
            conv = partial(
                ShortConv, cfg.conv_width, cfg.param_dtype, cfg.conv_bias, cfg.conv_activation == "silu",
                self.kernels.any_derivative,
            )  # fmt: skip
            self.attention_q, self.attention_k = dense(cfg.d_key), dense(cfg.d_key)
            self.attention_v = dense(cfg.d_inner)
            self.attention_conv_q, self.attention_conv_k, self.attention_conv_v = conv(), conv(), conv()

    def __call__(self, x: Hidden, transpoint: TransPoint, segment_ids: SegmentIds | None = None) -> Hidden:
        """Mix along the sequence: attention for tokens t < transpoint, the SSM for t >= transpoint."""
        ablation = self.config.ablation
        before = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < jnp.reshape(transpoint, (-1, 1))  # [1 or B, T]
        q, k, v = self._project(x, segment_ids)
        dt = self._compute_dt(x)
        ids, converted = segment_ids, v
        if ablation == "zero_state":
            ids = _restarted(before, x, segment_ids)
        if ablation == "converter_without_dt":
            converted = jnp.where(before[..., None, None], v / dt[..., None].astype(v.dtype), v)
        scanned = self._gate(x, self._scan(q, k, converted, dt, None, ids)[0])
        if ablation == "separate_weights":
            q, k, v = self._project_attention(x, segment_ids)
        attended = self._attend_ablated(x, q, k, v, segment_ids)
        return over_tokens(self.out, jnp.where(before[..., None], attended, scanned))

    def _project_attention(self, x: Hidden, segment_ids: SegmentIds | None) -> tuple[QueryKey, QueryKey, Value]:
        cfg = self.config
        heads = lambda y, count: y.reshape(*y.shape[:2], count, -1)
        q = heads(self.attention_conv_q(over_tokens(self.attention_q, x), segment_ids), cfg.num_groups)
        k = heads(self.attention_conv_k(over_tokens(self.attention_k, x), segment_ids), cfg.num_groups)
        v = heads(self.attention_conv_v(over_tokens(self.attention_v, x), segment_ids), cfg.num_heads)
        return (*self._rotate(q, k), v) if cfg.rotary == "both" else (q, k, v)

    def _attend_ablated(
        self, x: Hidden, q: QueryKey, k: QueryKey, v: Value, segment_ids: SegmentIds | None
    ) -> Float[Array, "B T HP"]:
        if self.config.ablation != "gated_attention":
            return self._attend(q, k, v, segment_ids)
        y = self._attend_unnormalised(q, k, v, segment_ids)
        y = y * nn.silu(over_tokens(self.z, x))
        return self.norm(y) if self.config.attention_norm else y


def _restarted(before: Bool[Array, "_ T"], x: Hidden, segment_ids: SegmentIds | None) -> SegmentIds:
    """Return segment ids that also begin again at the TransPoint, so that the SSM's state restarts there."""
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    return jnp.where(ids == 0, 0, 2 * ids + before)
