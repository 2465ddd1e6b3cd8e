"""Causal softmax attention inside documents: one function, four implementations.

`blockwise` is plain JAX for every device; `cudnn` and `splash` are the libraries' fused kernels for NVIDIA GPUs and
TPUs; `reference` is the formula. Scores are computed once per query/key group: a group whose H/G heads share them is
one attention head whose value is the H/G values side by side.
"""

from transmamba_jax.attention.api import Attention, Choice, Implementation, causal_attention, implementations
from transmamba_jax.attention.blockwise import NAME, Keys, Values, cached_attention, matmul_dtype

__all__ = [
    "NAME",
    "Attention",
    "Choice",
    "Implementation",
    "Keys",
    "Values",
    "cached_attention",
    "causal_attention",
    "implementations",
    "matmul_dtype",
]
