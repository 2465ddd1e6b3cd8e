"""Causal depthwise convolution along the sequence, forwards and backwards, as Pallas TPU kernels."""
