"""Accelerated operators. They import jax only."""
