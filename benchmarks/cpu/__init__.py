"""Benchmarks for the CPU: ratios against peers and against our own parts."""
