"""Compile a training step for hardware that is not here, and print what it needs."""

from transmamba_jax.compile_only.compiler import compile_only

__all__ = ["compile_only"]
