"""SSD as Triton kernels; `implementation.py` has the protocol's functions."""
