"""Measure this device: which implementation is right and fast, and which TransPoints. `runtime.calibration` reads."""
