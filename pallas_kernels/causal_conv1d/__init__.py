"""Causal depthwise convolution along the sequence, forward and backward pass, as Pallas TPU kernels."""
