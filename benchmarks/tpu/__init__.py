"""Benchmarks for TPUs, which the TPU's own compiler counts on any machine."""
