"""Benchmarks for GPUs."""
