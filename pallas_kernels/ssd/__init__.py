"""The state space dual operator of Mamba-2 (SSD), one signature over several implementations."""

from pallas_kernels.ssd.api import implementations, ssd, ssd_state, supports_output_start

__all__ = ["implementations", "ssd", "ssd_state", "supports_output_start"]
