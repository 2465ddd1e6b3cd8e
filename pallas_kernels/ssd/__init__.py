"""The state space dual operator of Mamba-2 (SSD), one signature over several implementations."""

from pallas_kernels.ssd.api import Choice, implementations, ssd, ssd_state, supports_output_start

__all__ = ["Choice", "implementations", "ssd", "ssd_state", "supports_output_start"]
