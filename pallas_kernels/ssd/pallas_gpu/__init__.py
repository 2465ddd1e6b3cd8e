"""SSD as Pallas Mosaic GPU kernels for Hopper; `implementation.py` has the protocol's functions."""
