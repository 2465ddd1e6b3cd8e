"""Mamba-2 weights in and out, as transformers and state-spaces name them; the command is in `__main__`."""

from transmamba_jax.convert.mamba2 import from_mamba2, to_mamba2

__all__ = ["from_mamba2", "to_mamba2"]
