"""Generate tokens and text: prefill, staged decode, sampling, states; the command is in `__main__`."""

from transmamba_jax.generate.decode import Decoder, DecodeState
from transmamba_jax.generate.sampling import Sampling
from transmamba_jax.generate.streaming import generate, stream

__all__ = ["DecodeState", "Decoder", "Sampling", "generate", "stream"]
