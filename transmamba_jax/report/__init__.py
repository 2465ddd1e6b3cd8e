"""The page, plots and numbers of one run; the command is in `__main__`."""

from transmamba_jax.report.summary import read_metrics, write_report

__all__ = ["read_metrics", "write_report"]
