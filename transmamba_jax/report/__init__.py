"""The page, plots and numbers of one run; the command is in `__main__`."""

from transmamba_jax.report.summary import is_written, read_metrics, write_report

__all__ = ["is_written", "read_metrics", "write_report"]
