"""Studies: grids of small runs that answer a question, with tables and plots; the command is in `__main__`."""

from transmamba_jax.study.report import write_report
from transmamba_jax.study.runner import run_study
from transmamba_jax.study.spec import Study, load_study

__all__ = ["Study", "load_study", "run_study", "write_report"]
