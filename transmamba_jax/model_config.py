"""Configuration of the model and of its kernels; `config` has the other sections."""

import dataclasses
import math
from typing import Literal

from pallas_kernels.ssd import Choice, implementations
from pallas_kernels.table import Table
from transmamba_jax import attention, schedule
from transmamba_jax.attention import Choice as AttentionChoice
from transmamba_jax.runtime.checks import INT32_MAX, at_least, at_most, check_types, divisors, require, suggestion

_MAX_LAYERS = 10_000
_MAX_ARRAY = 10**14
"""Numbers of one array: 400 TB in float32, beyond every machine that there is."""

DTypeName = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Every schedule has the same parameters, so `transpoints` may change after training."""

    vocab_size: int = 256
    """Number of token ids (V)."""
    num_layers: int = 8
    """Blocks of one mixer and one gated MLP (L)."""
    d_model: int = 256
    """Width of the residual stream (D). Any: heads split the mixer's own width, num_heads · head_dim."""
    num_heads: int = 4
    """Value heads (H)."""
    num_groups: int = 4
    """Query/key groups (G), divides num_heads."""
    head_dim: int = 64
    """Channels of one value head (P)."""
    state_dim: int = 64
    """Channels of one query/key head, which is the SSM state size (N)."""
    mlp_dim: int = 704
    """Hidden width of the gated MLP; 0: no MLP."""
    conv_width: int = 4
    """Taps of the causal depthwise convolution, the current token included."""
    transpoints: tuple[int, ...] = (0, 8, 16, 32, 64, 128, 256, 512)
    """TransPoint of each layer: tokens from the start of the row that go through attention; repeated over the layers.
    In a file and on the command line also a name, scaled to data.seq_len: log_spaced, descending, transformer, mamba2,
    hybrid, hybrid_first, v1 to v9."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rotary: Literal["attention", "both"] = "attention"
    """Rotate q and k for attention only, or also C and B of the SSM and of the Memory Converter."""
    attention_norm: bool = True
    """RMSNorm on the attention branch, with the weight of the SSM branch's gated norm."""
    use_d_skip: bool = True
    """The D skip connection of the SSM branch."""
    conv_activation: Literal["silu", "none"] = "silu"
    """Nonlinearity behind the short convolutions of q, k and v. With `none` their taps begin as the identity; with
    conv_width 1 and no conv_bias besides, attention is that of a plain Transformer (a scale a channel is left)."""
    conv_bias: bool = True
    """Biases in the short convolutions."""
    ablation: Literal["none", "zero_state", "converter_without_dt", "gated_attention", "separate_weights"] = "none"
    """One part of the mixer changed, for studies (see `ablations`). Any but none runs both branches over the whole row
    and cannot decode."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Smallest and largest Δ; a Δ beyond is clipped, after softplus."""
    residual_in_fp32: bool = False
    """Keep the residual stream in float32 when dtype is narrower."""
    dtype: DTypeName = "bfloat16"
    """Compute dtype. A, Δ, decay sums, states, softmax and loss are float32 whatever it is."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters that `model.init` makes and that converted weights have. Training keeps float32
    parameters and moments whatever it is, and checkpoints have those."""
    tie_embeddings: bool = True
    """Logits reuse the embedding matrix."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Recompute in the backward pass: nothing, all but matmuls, attention and the SSM, or entire layers."""

    def __post_init__(self) -> None:
        """Check the ranges and the rules between fields."""
        check_types("model", self)
        sizes = ("vocab_size", "num_layers", "d_model", "num_heads", "num_groups", "head_dim", "state_dim")
        at_least("model", self, 1, *sizes, "conv_width")
        at_least("model", self, 0, "mlp_dim")
        at_most("model", self, _MAX_LAYERS, "num_layers")
        at_most("model", self, INT32_MAX, *sizes, "conv_width", "mlp_dim")
        require(
            self.num_heads % self.num_groups == 0,
            f"model.num_groups must divide model.num_heads, found num_groups={self.num_groups}, "
            f"num_heads={self.num_heads}; use one of {divisors(self.num_heads)}",
        )
        widest = max(self.num_layers * max(self.d_inner, self.d_key, self.mlp_dim), self.vocab_size)
        require(
            self.d_model * widest <= _MAX_ARRAY,
            f"model.d_model={self.d_model} times the widest layer or the vocabulary makes an array of "
            f"{self.d_model * widest:.1e} numbers, more than {_MAX_ARRAY:.0e}; found num_layers={self.num_layers}, "
            f"vocab_size={self.vocab_size}, num_heads * head_dim={self.d_inner}, num_groups * state_dim={self.d_key}, "
            f"mlp_dim={self.mlp_dim}",
        )
        require(
            self.state_dim % 2 == 0,
            f"model.state_dim must be even (rotary embedding turns pairs of channels), found {self.state_dim}",
        )
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"model.{name} must be positive and finite, found {value}")
        limit = self.dt_limit
        require(
            len(limit) == 2 and 0 <= limit[0] < limit[1],
            f"model.dt_limit must be two numbers, 0 <= smallest < largest, found {list(limit)}",
        )
        try:
            schedule.expand(self.transpoints, self.num_layers)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None

    @property
    def d_inner(self) -> int:
        """Width of the mixer's value path, H·P."""
        return self.num_heads * self.head_dim

    @property
    def d_key(self) -> int:
        """Width of the mixer's query and key paths, G·N."""
        return self.num_groups * self.state_dim


@dataclasses.dataclass(frozen=True)
class KernelsConfig:
    """Choose the implementations that run: a matter of speed, not of the result, and no part of a checkpoint."""

    ssd: str | None = None
    """SSD operator: reference, associative, sequential, pallas_tpu, pallas_gpu or triton; None: the fastest of this
    device's calibration, else by device and shape."""
    attention: str | None = None
    """Causal attention: reference, blockwise, cudnn or splash; None: as for ssd."""
    chunk_size: int = 64
    """Tokens of one chunk of the SSD operator."""
    unrolled_layers: int | None = None
    """Layers per iteration of the loop over layers, at least one period of the schedule; None: 8 where a run
    trains on a CPU, else 1. On a CPU more of them make a step faster, and compilation slower."""

    def __post_init__(self) -> None:
        """Check the names and the range."""
        check_types("kernels", self)
        at_least("kernels", self, 1, "chunk_size")
        if self.unrolled_layers is not None:
            at_least("kernels", self, 1, "unrolled_layers")
        for field, names in (("ssd", implementations()), ("attention", attention.implementations())):
            name = getattr(self, field)
            require(
                name is None or name in names,
                f"kernels.{field} must be null (by device) or the name of an implementation, found {name!r}"
                f"{suggestion(str(name), names)}",
            )

    @property
    def any_derivative(self) -> bool:
        """Tell whether the model has every derivative, in both modes; other kernels have reverse mode alone, once."""
        return self.ssd == self.attention == "reference"

    @property
    def ssd_choice(self) -> Choice:
        """The `implementation` of the SSD operator."""
        return self.ssd

    @property
    def attention_choice(self) -> AttentionChoice:
        """The `implementation` of attention."""
        return self.attention


@dataclasses.dataclass(frozen=True)
class MeasuredKernels(KernelsConfig):
    """The options, with measurements of this device behind those that are None; see `runtime.calibration`."""

    ssd_table: Table | None = None
    attention_table: Table | None = None

    @property
    def ssd_choice(self) -> Choice:
        """The name given, else the measurements."""
        return self.ssd_table if self.ssd is None else self.ssd

    @property
    def attention_choice(self) -> AttentionChoice:
        """The name given, else the measurements."""
        return self.attention_table if self.attention is None else self.attention
