"""Optimizer, train step, loop and metrics."""
