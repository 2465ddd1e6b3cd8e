"""Compile a training step for absent hardware, and print its memory and time."""

from transmamba_jax.compile_only.compiler import compile_only

__all__ = ["compile_only"]
