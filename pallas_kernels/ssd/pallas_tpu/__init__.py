"""SSD as Pallas TPU kernels; `implementation.py` has the protocol's functions."""
